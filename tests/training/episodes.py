"""Six short conversations and a tiny routed model that answers them."""

import torch

from bem.config import PolicyGradientConfig, RewardConfig
from bem.training.data import Example, encode
from bem.training.environment import Environment
from tests.conftest import make_llama, make_tokenizer
from tests.routing.mounted import mounted

TOKENIZER = make_tokenizer()
EXAMPLES = [Example(str(n), "name the function. " * (1 + n % 3), ("that",)) for n in range(6)]
PROMPTS = [encode(e, TOKENIZER, 256, with_answer=False) for e in EXAMPLES]
REWARD = RewardConfig(quality=1.0, validity=0.0, flip_cost=0.25, rank_cost=0.125)
CONFIG = PolicyGradientConfig(
    iterations=3,
    episodes=6,
    samples=2,
    batch_size=3,
    max_new_tokens=12,
    reward=REWARD,
    damping=0.01,
)


def environment(score=lambda row, answer: {"quality": 0.5}, model=None) -> Environment:
    torch.manual_seed(0)
    model = model or mounted(make_llama(), chunk_size=8)
    return Environment(model, TOKENIZER, score, REWARD, CONFIG.max_new_tokens, CONFIG.batch_size)
