"""One torch thread, fixed seeds, no network; a micro Llama with a tokenizer built on the spot."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
# shapes in signatures are checked while tests run; before anything of these packages is imported
install_import_hook(["bem.kernels", "bem.variants", "bem.control"], "beartype.beartype")


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries that we call still draw from it
    torch.manual_seed(0)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 320 entries, trained on two sentences."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = ["User: name the function that this docstring describes.\nAssistant: return the value"]
    tokenizer.train_from_iterator(text * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )


def make_llama(**changes) -> LlamaForCausalLM:
    """A random Llama with 4 layers of width 32, in eval mode."""
    torch.manual_seed(0)
    values = dict(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def micro_llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def micro_base(tmp_path_factory) -> Path:
    """Folder of a random micro Llama with its tokenizer: what `--base` takes."""
    folder = tmp_path_factory.mktemp("micro_base")
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
