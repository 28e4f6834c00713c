"""The contract that every variant passes, ours or a stranger's, on every architecture.

    report = check_adapter(lambda model: bem.attach(model, "v1", rank=4, chunk_size=8))
    print(report.table()); report.raise_if_failed()

Models are built here, tiny and random, so nothing is downloaded. Adapter weights are perturbed
before a check (except `identity_at_birth`): an adapter that does nothing would pass everything.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bem.adapters.attach import Attached, load
from bem.adapters.checks_models import ARCHITECTURES, VOCAB, tiny_model
from bem.control.chunks import turns_from_labels
from bem.errors import AttachError, CheckpointError, TrainingError

Make = Callable[[Any], Attached]
TOKENS = 45  # several chunks of 8, the last one not full
TOLERANCE = 1e-4  # largest |difference| of float32 logits


@dataclass(frozen=True)
class Outcome:
    """Result of one check on one architecture."""

    architecture: str
    check: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All outcomes of one adapter."""

    outcomes: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """True if nothing failed."""
        return all(o.passed for o in self.outcomes)

    def table(self) -> str:
        """Architectures by checks, as text."""
        names = list(dict.fromkeys(o.check for o in self.outcomes))
        lines = []
        for arch in dict.fromkeys(o.architecture for o in self.outcomes):
            mine = {o.check: o for o in self.outcomes if o.architecture == arch}
            marks = " ".join("ok" if mine[n].passed else "FAIL" for n in names if n in mine)
            lines.append(f"{arch:10s} {marks}")
        return "\n".join(["checks: " + ", ".join(names), *lines])

    def raise_if_failed(self) -> None:
        """AttachError naming every failed check."""
        failed = [f"{o.architecture}/{o.check}: {o.detail}" for o in self.outcomes if not o.passed]
        if failed:
            raise AttachError("the adapter breaks its contract:\n" + "\n".join(failed))


def check_adapter(
    make: Make, architectures: list[str] | None = None, checks: list[str] | None = None
) -> Report:
    """Run the contract.

    Args:
        make: attaches the adapter to a model; called afresh for every check.
        architectures: names from `ARCHITECTURES`; None: all.
        checks: names from `CHECKS`; None: all.
    """
    outcomes = []
    for arch in architectures or list(ARCHITECTURES):
        for name in checks or list(CHECKS):
            try:
                detail = CHECKS[name](make, arch)
                outcomes.append(Outcome(arch, name, True, detail or ""))
            except Exception as error:  # a check of foreign code: whatever it raises is its result
                outcomes.append(Outcome(arch, name, False, f"{type(error).__name__}: {error}"))
    return Report(tuple(outcomes))


def identity_at_birth(make: Make, arch: str) -> str:
    """Attaching changes nothing."""
    model, ids = tiny_model(arch), _ids()
    before = _logits(model, ids)
    return _equal(_logits(_eval(make(model)).model, ids), before, 0.0)


def detach_restores(make: Make, arch: str) -> str:
    """Detaching gives back the model bit for bit: weights, flags, outputs, no hooks."""
    model, ids = tiny_model(arch), _ids()
    weights = {n: p.clone() for n, p in model.named_parameters()}
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    before = _logits(model, ids)
    back = _perturbed(make(model)).detach()
    assert back is model, "another model came back"
    assert {n: p.requires_grad for n, p in back.named_parameters()} == flags, (
        "requires_grad changed"
    )
    assert all(torch.equal(p, weights[n]) for n, p in back.named_parameters()), "weights changed"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in back.modules()), "hooks remain"
    return _equal(_logits(back, ids), before, 0.0)


def disable_restores(make: Make, arch: str) -> str:
    """PEFT's `disable_adapter` shows the base, and the adapter comes back afterwards."""
    model, ids = tiny_model(arch), _ids()
    before = _logits(model, ids)
    attached = _perturbed(make(model))
    adapted = _logits(attached.model, ids)
    with attached.model.disable_adapter():
        _equal(_logits(attached.model, ids), before, 0.0)
    assert (adapted - before).abs().max() > 1e-2, (
        "the perturbed adapter does nothing: the check is void"
    )
    return _equal(_logits(attached.model, ids), adapted, 0.0)


def only_the_adapter_trains(make: Make, arch: str) -> str:
    """Adapter parameters all get a gradient; nothing else gets one."""
    attached = _perturbed(make(tiny_model(arch)))
    attached.model.train()
    ids = _ids()
    known = _evidence(attached.model, len(ids))
    attached.model(input_ids=ids, labels=ids, use_cache=False, **known).loss.backward()
    mine = dict(attached.named_parameters())
    silent = [n for n, p in mine.items() if p.grad is None or not p.grad.abs().sum() > 0]
    assert mine and not silent, f"no gradient: {silent[:4]}"
    ids = {id(p) for p in mine.values()}
    loud = [
        n for n, p in attached.model.named_parameters() if id(p) not in ids and p.grad is not None
    ]
    assert not loud, f"the base got gradients: {loud[:4]}"
    return f"{len(mine)} tensors"


def blind_to_the_future(make: Make, arch: str) -> str:
    """A later token moves no earlier logit; control is constant within a chunk."""
    attached = _perturbed(make(tiny_model(arch)))
    ids = _ids()
    before = _logits(attached.model, ids)
    runtime = attached.base.bem_runtime
    if runtime.wiring is not None:
        size = runtime.wiring.controller.chunk_size
        for index in range(len(runtime.wiring.members)):
            part = runtime.ambient.last.control_per_token(index)
            for start in range(0, TOKENS, size):
                chunk = part[:, start : start + size]
                assert torch.equal(chunk, chunk[:, :1].expand_as(chunk)), (
                    "control changed inside a chunk"
                )
    for at in (7, 8, 20, TOKENS - 1):
        changed = ids.clone()
        changed[:, at] = (changed[:, at] + 1) % VOCAB
        _equal(_logits(attached.model, changed)[:, :at], before[:, :at], 1e-5)
    return ""


def cache_is_exact(make: Make, arch: str) -> str:
    """Prefill = token by token = uneven pieces = copied prefix = cropped and continued."""
    attached = _perturbed(make(tiny_model(arch)))
    ids = _ids()
    full = _logits(attached.model, ids)
    worst = 0.0
    for cuts in ([*range(1, TOKENS)], [13, 14, 15, 31, 32], [8, 16, 40]):
        worst = max(worst, _difference(_in_pieces(attached.model, ids, cuts), full))
    start, cache = _piece(attached.model, ids[:, :19], None)
    other = copy.deepcopy(cache)
    rest, cache = _piece(attached.model, ids[:, 19:], cache)
    again, _ = _piece(attached.model, ids[:, 19:], other)
    worst = max(worst, _difference(torch.cat([start, rest], 1), full), _difference(again, rest))
    if cache.is_croppable:
        _crop(cache, TOKENS, 21)
        rest, _ = _piece(attached.model, ids[:, 21:], cache)
        worst = max(worst, _difference(rest, full[:, 21:]))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def padding_is_invisible(make: Make, arch: str) -> str:
    """A left-padded batch gives each row what it gets alone, whole and in pieces."""
    attached = _perturbed(make(tiny_model(arch)))
    ids, worst = _ids(), 0.0
    lengths = (TOKENS, TOKENS - 11)
    mask = torch.stack([torch.arange(TOKENS) >= TOKENS - n for n in lengths]).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = _forward(attached.model, ids, attention_mask=mask, position_ids=positions).logits
    parts, cache = [], None
    for a, b in ((0, 5), (5, 20), (20, 21), (21, TOKENS)):
        out = _forward(
            attached.model,
            ids[:, a:b],
            attention_mask=mask[:, :b],
            position_ids=positions[:, a:b],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        parts.append(out.logits)
    for row, length in enumerate(lengths):
        given = {k: v[row : row + 1] for k, v in _evidence(attached.model, 2).items()}
        alone = _forward(attached.model, ids[row : row + 1, -length:], **given).logits[0]
        for batch in (whole, torch.cat(parts, 1)):
            worst = max(worst, _difference(batch[row, -length:], alone))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def generation_is_exact(make: Make, arch: str) -> str:
    """Greedy and beam search through the cache score what a forward without cache scores."""
    attached = _perturbed(make(tiny_model(arch)))
    attached.base.generation_config.eos_token_id = None  # never stops early, no token is ruled out
    prompt, worst = _ids()[:, :13], 0.0
    for beams in (1, 3):
        with torch.no_grad():
            out = attached.model.generate(
                input_ids=prompt,
                max_new_tokens=20,
                num_beams=beams,
                do_sample=False,
                pad_token_id=0,
                attention_mask=torch.ones_like(prompt),
                output_scores=True,
                return_dict_in_generate=True,
                **_evidence(attached.model, len(prompt)),
            )
        turns = torch.zeros_like(out.sequences, dtype=torch.bool)
        turns[:, prompt.shape[1] - 1] = True
        plain = _forward(attached.model, out.sequences, turn_starts=turns, use_cache=False).logits
        new = out.sequences[:, prompt.shape[1] :]
        wanted = (
            plain[:, prompt.shape[1] - 1 : -1].log_softmax(-1).gather(-1, new[..., None])[..., 0]
        )
        beams_of = getattr(out, "beam_indices", None)
        got = attached.model.compute_transition_scores(
            out.sequences, out.scores, beams_of, normalize_logits=beams == 1
        )
        worst = max(worst, _difference(got, wanted))
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def turns_restart_chunks(make: Make, arch: str) -> str:
    """Training with labels and decoding behind the same prompt give the same logits."""
    attached = _perturbed(make(tiny_model(arch)))
    ids = _ids()
    labels = ids.clone()
    labels[:, :13] = -100
    trained = _forward(attached.model, ids, labels=labels, use_cache=False).logits
    given = _forward(
        attached.model, ids, turn_starts=turns_from_labels(labels), use_cache=False
    ).logits
    return _equal(given, trained, 0.0)


def evidence_travels(make: Make, arch: str) -> str:
    """Evidence given once holds on through the cache; new evidence changes no earlier logit."""
    attached, ids = _perturbed(make(tiny_model(arch))), _ids()
    known = _evidence(attached.model, 2)
    if not known:
        return "reads no evidence"
    model, first = attached.model, known["evidence"]
    whole = _forward(model, ids, use_cache=False).logits
    _, cache = _piece(model, ids[:, :19], None)
    _, cache = _piece(model, ids[:, 19:20], cache)
    rest = _forward(model, ids[:, 20:], past_key_values=cache, evidence=None).logits
    worst = _difference(rest, whole[:, 20:])
    new = first.flip(1)
    turns = torch.zeros_like(ids, dtype=torch.bool)
    turns[:, 27] = True
    by_token = torch.where(
        (torch.arange(TOKENS) >= 27)[None, :, None], new[:, None], first[:, None]
    )
    both = _forward(model, ids, turn_starts=turns, evidence=by_token, use_cache=False).logits
    _, cache = _piece(model, ids[:, :27], None)
    later = _forward(
        model, ids[:, 27:], past_key_values=cache, turn_starts=turns[:, 27:], evidence=new
    ).logits
    worst = max(worst, _difference(both[:, 27:], later), _difference(both[:, :27], whole[:, :27]))
    assert _difference(both[:, 27:], whole[:, 27:]) > 1e-2, "the evidence changes nothing"
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def round_trip(make: Make, arch: str) -> str:
    """What was saved is what loads, in BEM and in PEFT; a changed file is refused."""
    from peft import PeftModel

    attached, ids = _perturbed(make(tiny_model(arch))), _ids()
    wanted = _logits(attached.model, ids)
    with tempfile.TemporaryDirectory() as work:
        folder = attached.save(f"{work}/adapter")
        _equal(_logits(load(tiny_model(arch), folder).model, ids), wanted, 0.0)
        _equal(_logits(PeftModel.from_pretrained(tiny_model(arch), str(folder)), ids), wanted, 0.0)
        weights = folder / "adapter_model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(bytes(data))
        try:
            load(tiny_model(arch), folder)
        except CheckpointError:
            return ""
    raise AssertionError("a changed file was loaded")


def price_is_true(make: Make, arch: str) -> str:
    """The stated parameters and matrix FLOPs are those that are there and that run."""
    from torch.utils.flop_counter import FlopCounterMode

    model, tokens = tiny_model(arch), 64
    ids = torch.arange(tokens)[None] % VOCAB

    def count(model: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            _logits(model, ids)
        return counter.get_total_flops()

    plain = count(model)
    attached = _perturbed(make(model))
    price = attached.price(tokens)
    assert price.parameters == sum(p.numel() for p in attached.parameters()), "parameters differ"
    _logits(attached.model, ids)  # factors that depend on the weights alone are computed once
    real = count(attached.model) - plain
    assert abs(real - price.flops_per_token * tokens) < 0.5, (
        f"stated {price.flops_per_token * tokens}, real {real}"
    )
    return f"{real / tokens:.0f} FLOPs/token"


def survives_checkpointing(make: Make, arch: str) -> str:
    """Gradients under gradient checkpointing are those without; the reentrant kind may be refused."""
    attached, ids = _perturbed(make(tiny_model(arch))), _ids()
    attached.model.train()
    gradients = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            attached.base.gradient_checkpointing_enable({"use_reentrant": reentrant})
            attached.base.enable_input_require_grads()
        torch.manual_seed(0)  # the same noise in the rank mask
        try:
            _loss(attached.model, ids).backward()
        except TrainingError:
            assert reentrant, "only the reentrant kind may be refused"
            continue
        gradients.append([p.grad.clone() for p in attached.parameters() if p.grad is not None])
        for parameter in attached.parameters():
            parameter.grad = None
    worst = max(
        _difference(a, b) for g in gradients[1:] for a, b in zip(gradients[0], g, strict=True)
    )
    assert worst < TOLERANCE, f"max |difference| {worst:.1e}"
    return f"{worst:.0e}"


def runs_in_bfloat16(make: Make, arch: str) -> str:
    """A bfloat16 base: finite logits of its dtype, finite gradients for every adapter parameter."""
    attached = _perturbed(make(tiny_model(arch).to(torch.bfloat16)))
    out = _forward(attached.model, _ids())
    assert out.logits.dtype == torch.bfloat16 and torch.isfinite(out.logits).all(), (
        "logits are not finite bfloat16"
    )
    attached.model.train()
    _loss(attached.model, _ids()).backward()
    bad = [
        n
        for n, p in attached.named_parameters()
        if p.grad is None or not torch.isfinite(p.grad).all()
    ]
    assert not bad, f"gradients are not finite: {bad[:3]}"
    return ""


def compiles(make: Make, arch: str) -> str:
    """torch.compile finds no graph break in an adapted layer, and changes nothing."""
    from torch import nn

    from bem.adapters.peft_method import BemSite

    attached, ids = _perturbed(make(tiny_model(arch))), _ids()
    wanted = _logits(attached.model, ids)
    torch._dynamo.reset()
    parents = [
        (m, n, c)
        for m in attached.base.modules()
        for n, c in m.named_children()
        if isinstance(c, BemSite)
    ]
    for parent, name, site in parents:
        parent.__dict__["_modules"][name] = _Compiled(site)
    result = _equal(_logits(attached.model, ids), wanted, 1e-5)
    for parent, name, site in parents:
        parent.__dict__["_modules"][name] = site
    assert isinstance(attached.base, nn.Module) and parents
    return result


class _Compiled(torch.nn.Module):
    """An adapted layer under torch.compile(fullgraph=True): a graph break is an error."""

    def __init__(self, site: Any):
        super().__init__()
        self.weight = site.weight
        self._run = torch.compile(site.forward, fullgraph=True, backend="eager", dynamic=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._run(x)


CHECKS: dict[str, Callable[[Make, str], str]] = {
    "identity_at_birth": identity_at_birth,
    "detach_restores": detach_restores,
    "disable_restores": disable_restores,
    "only_the_adapter_trains": only_the_adapter_trains,
    "blind_to_the_future": blind_to_the_future,
    "cache_is_exact": cache_is_exact,
    "padding_is_invisible": padding_is_invisible,
    "generation_is_exact": generation_is_exact,
    "turns_restart_chunks": turns_restart_chunks,
    "evidence_travels": evidence_travels,
    "round_trip": round_trip,
    "price_is_true": price_is_true,
    "survives_checkpointing": survives_checkpointing,
    "runs_in_bfloat16": runs_in_bfloat16,
    "compiles": compiles,
}


def _ids() -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(1, VOCAB, (2, TOKENS), generator=generator)


def _eval(attached: Attached) -> Attached:
    attached.model.eval()
    return attached


def _perturbed(attached: Attached) -> Attached:
    """Random adapter weights, so that every part of it acts."""
    with _seeded():
        for parameter in attached.parameters():
            parameter.data = torch.randn(parameter.shape).to(parameter) * 0.2
    return _eval(attached)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def _forward(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    """A forward pass, with evidence for adapters that read it."""
    with torch.no_grad():
        return model(input_ids=ids, **{**_evidence(model, len(ids)), **kwargs})


def _evidence(model: Any, rows: int) -> dict[str, Tensor]:
    """Keyword argument with different evidence for each row; empty if nothing active reads any."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    runtime = vars(inner).get("bem_runtime")
    readers = runtime.wiring.controller.conditioning if runtime and runtime.wiring else {}
    width = readers.get("evidence", 0)
    if not width:
        return {}
    values = torch.linspace(0.1, 1.0, 2 * width).view(2, width)
    return {"evidence": torch.cat([values, values.flip(1)])[:rows]}


def _logits(model: Any, ids: Tensor) -> Tensor:
    return _forward(model, ids, use_cache=False).logits


def _loss(model: Any, ids: Tensor) -> Tensor:
    labels = ids.clone()
    labels[:, :13] = -100
    given = _evidence(model, len(ids))
    return model(input_ids=ids, labels=labels, use_cache=False, **given).loss


def _piece(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    out = _forward(model, ids, past_key_values=cache, use_cache=True)
    return out.logits, out.past_key_values


def _in_pieces(model: Any, ids: Tensor, cuts: list[int]) -> Tensor:
    parts, cache = [], None
    for a, b in zip([0, *cuts], [*cuts, ids.shape[1]], strict=True):
        logits, cache = _piece(model, ids[:, a:b], cache)
        parts.append(logits)
    return torch.cat(parts, 1)


def _crop(cache: Any, length: int, keep: int) -> None:
    """Newer transformers count the tokens to remove, older ones the length to keep."""
    try:
        cache.crop(keep - length)
    except ValueError:
        cache.crop(keep)


def _difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    return float((a.float() - b.float()).abs().max())


def _equal(a: Tensor, b: Tensor, tolerance: float) -> str:
    found = _difference(a, b)
    assert found <= tolerance, f"max |difference| {found:.1e}"
    return f"{found:.0e}" if found else "0"
