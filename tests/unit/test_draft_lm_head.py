"""The LM head as the early heads read it, without an engine: rows, scales, ids, confidence."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_adadecode.kernels.confidence import top1_confidence
from vllm_adadecode.model import draft_lm_head as lm_head
from vllm_adadecode.model import lm_head_rows
from vllm_adadecode.model.draft_lm_head import HeadProjection
from vllm_adadecode.model.lm_head_rows import quantize_rows

HIDDEN, VOCAB, PADDED = 32, 100, 128
DRAFT_VOCAB = torch.tensor([3, 4, 17, 50, 51, 98])


def make_target(weight: torch.Tensor, scale: float = 1.0, soft_cap: float | None = None) -> Any:
    """What `HeadProjection` looks at of a vLLM model; rows from `VOCAB` on are padding."""

    def compute_logits(x: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(x, weight[:VOCAB])
        if soft_cap is not None:
            logits = soft_cap * torch.tanh(logits / soft_cap)
        return logits * scale

    return SimpleNamespace(
        lm_head=SimpleNamespace(
            weight=weight,
            quant_method=UnquantizedEmbeddingMethod(),
            tp_size=1,
            tp_rank=0,
            org_vocab_size=VOCAB,
            embedding_dim=HIDDEN,
            shard_indices=SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=VOCAB),
            parameters=lambda: iter([weight]),
        ),
        model=SimpleNamespace(norm=SimpleNamespace(weight=weight.new_ones(HIDDEN))),
        logits_processor=SimpleNamespace(org_vocab_size=VOCAB, scale=scale, soft_cap=soft_cap),
        compute_logits=compute_logits,
    )


@pytest.fixture
def weight() -> torch.Tensor:
    torch.manual_seed(0)
    # Rows of very different sizes: one scale for all of them would lose the small ones.
    sizes = torch.logspace(-3, 1, PADDED)[torch.randperm(PADDED)]
    return torch.randn(PADDED, HIDDEN) * sizes[:, None]


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(7, HIDDEN)


# --- quantisation ------------------------------------------------------------------------------


@pytest.fixture(params=[8192, 30], ids="{} rows at once".format)
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lm_head, lm_head_rows):
        monkeypatch.setattr(module, "CHUNK_ROWS", request.param)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_rows(weight: torch.Tensor, dtype: torch.dtype) -> None:
    weight = weight.to(dtype)
    weight[7] = 0.0
    rows, scales = quantize_rows(weight)
    assert (rows.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (PADDED,))
    # Every row uses its whole range, and is off by half a step at most; one of zeros stays so.
    used = torch.full((PADDED,), 127).index_fill_(0, torch.tensor([7]), 0)
    assert torch.equal(rows.int().abs().amax(-1), used)
    assert scales[7] == 0
    error = (rows.float() * scales[:, None] - weight.float()).abs()
    assert (error <= 0.5001 * scales[:, None]).all()


# --- projection --------------------------------------------------------------------------------


def test_without_a_copy_the_target_is_asked(weight: torch.Tensor, x: torch.Tensor) -> None:
    target = make_target(weight)
    projection = HeadProjection(target, None, None, torch.float32)
    assert projection.rows is None
    logits = projection.logits(x)
    assert torch.equal(logits, target.compute_logits(x))
    assert projection.over_all_tokens(logits) is logits
    assert projection.to_token_ids(torch.tensor([5])).tolist() == [5]


@pytest.mark.parametrize("options", [{}, {"scale": 0.25}, {"soft_cap": 3.0}], ids=str)
def test_draft_vocabulary(weight: torch.Tensor, x: torch.Tensor, options: dict[str, Any]) -> None:
    target = make_target(weight, **options)
    projection = HeadProjection(target, DRAFT_VOCAB, None, torch.float32)
    logits = projection.logits(x)
    whole = target.compute_logits(x)
    torch.testing.assert_close(logits, whole[:, DRAFT_VOCAB])
    assert projection.to_token_ids(torch.tensor([0, 5, 2])).tolist() == [3, 98, 17]
    full = projection.over_all_tokens(logits)
    assert full.shape == whole.shape
    assert torch.equal(full[:, DRAFT_VOCAB], logits)
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[DRAFT_VOCAB] = False
    assert (full[:, outside] == -torch.inf).all()


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("draft_vocab", [None, DRAFT_VOCAB], ids=["all", "draft"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantised_copy(
    weight: torch.Tensor,
    x: torch.Tensor,
    dtype: torch.dtype,
    draft_vocab: torch.Tensor | None,
) -> None:
    weight, x = weight.to(dtype), x.to(dtype)
    projection = HeadProjection(make_target(weight), draft_vocab, "int8", dtype)
    logits = projection.logits(x)
    assert logits.dtype == dtype
    rows = weight[:VOCAB] if draft_vocab is None else weight[draft_vocab]
    assert logits.shape == (len(x), len(rows))
    exact = x.double() @ rows.double().T
    # Errors of the weights add up as a random walk; a scale off by one row is off by far more.
    allowed = 3 / 127 * rows.double().abs().amax(-1) * HIDDEN**0.5
    assert ((logits.double() - exact).abs() <= allowed).all()


def test_logits_take_the_dtype_of_the_heads(weight: torch.Tensor, x: torch.Tensor) -> None:
    """vLLM's ``head_dtype``: the cache of draft logits has it, too."""
    projection = HeadProjection(make_target(weight.bfloat16()), DRAFT_VOCAB, None, torch.float32)
    assert projection.logits(x.bfloat16()).dtype == torch.float32


def test_the_copy_is_not_saved_with_the_model(weight: torch.Tensor) -> None:
    projection = HeadProjection(make_target(weight), DRAFT_VOCAB, "int8", torch.float32)
    assert projection.state_dict() == {}
    assert {name for name, _ in projection.named_buffers()} == {"rows", "scales", "draft_vocab"}


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_refresh(weight: torch.Tensor, quantization: Any) -> None:
    """The copy follows the target's weights, at the same address."""
    target = make_target(weight)
    projection = HeadProjection(target, DRAFT_VOCAB, quantization, torch.float32)
    assert projection.rows is not None
    address = projection.rows.data_ptr()
    target.lm_head.weight.copy_(weight.flip(0) * 3)
    assert projection.draft_vocab is not None
    projection.draft_vocab.fill_(-1)
    projection.refresh()
    fresh = HeadProjection(target, DRAFT_VOCAB, quantization, torch.float32)
    x = torch.eye(HIDDEN)
    assert torch.equal(projection.logits(x), fresh.logits(x))
    assert projection.rows.data_ptr() == address
    HeadProjection(target, None, None, torch.float32).refresh()


class Quantised:
    """A quantised LM head to `HeadProjection`: it multiplies, and shows no weights."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert bias is None
        return functional.linear(x, self.weight.to(x.dtype))


def quantised(target: Any) -> Any:
    """The target with such an LM head."""
    target.lm_head.quant_method = Quantised(target.lm_head.weight)
    del target.lm_head.weight
    return target


@pytest.mark.parametrize("chunk_columns", [256, 7])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("draft_vocab", [None, DRAFT_VOCAB], ids=["all", "draft"])
@pytest.mark.parametrize("options", [{}, {"scale": 0.25, "soft_cap": 3.0}], ids=str)
def test_a_quantised_lm_head(
    weight: torch.Tensor,
    options: dict[str, Any],
    draft_vocab: torch.Tensor | None,
    quantization: Any,
    chunk_columns: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copy is the one that is made of plain weights, to the last bit."""
    monkeypatch.setattr(lm_head_rows, "CHUNK_COLUMNS", chunk_columns)
    plain = HeadProjection(make_target(weight, **options), draft_vocab, quantization, torch.float32)
    target = quantised(make_target(weight, **options))
    copied = HeadProjection(target, draft_vocab, quantization, torch.float32)
    for name in ("rows", "scales", "draft_vocab"):
        a, b = getattr(plain, name), getattr(copied, name)
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    # New weights, as after a reload.
    target.lm_head.quant_method.weight = weight * 2
    copied.refresh()
    if copied.rows is not None and plain.rows is not None and quantization is None:
        assert torch.equal(copied.rows, 2 * plain.rows)


def test_a_repacked_lm_head(weight: torch.Tensor) -> None:
    """vLLM may keep a packed form alone, and an empty weight."""
    target = make_target(weight)
    target.lm_head.weight = torch.empty(0)
    target.lm_head.quant_method = UnquantizedLinearMethod()
    target.lm_head.quant_method.apply = Quantised(weight).apply
    projection = HeadProjection(target, DRAFT_VOCAB, None, torch.float32)
    assert torch.equal(projection.rows, weight[DRAFT_VOCAB])
    assert HeadProjection(target, None, None, torch.float32).kernel_weight(torch.float32) is None


# --- confidence --------------------------------------------------------------------------------


def test_other_is_the_missing_mass() -> None:
    """With the exact log-sum-exp of what is left out, the confidence is that of all tokens."""
    torch.manual_seed(0)
    logits = 5 * torch.randn(50, VOCAB)
    outside = torch.ones(VOCAB, dtype=torch.bool)
    outside[DRAFT_VOCAB] = False
    column, p = top1_confidence(logits[:, DRAFT_VOCAB], logits[:, outside].logsumexp(-1))
    probabilities = logits.softmax(-1)[:, DRAFT_VOCAB]
    torch.testing.assert_close(p, probabilities.amax(-1))
    assert torch.equal(column, probabilities.argmax(-1))


def test_other_at_its_extremes() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]]).expand(4, 3)
    other = torch.tensor([-torch.inf, -1e4, 1e4, torch.nan])
    column, p = top1_confidence(logits, other)
    alone = top1_confidence(logits[:1])[1].item()
    assert column.tolist() == [1, 1, 1, 1]
    assert p[:3].tolist() == pytest.approx([alone, alone, 0.0])
    assert p[3].isnan()


# --- the fused kernels (here their references) in place of logits ---------------------------------


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("draft_vocab", [None, DRAFT_VOCAB], ids=["all", "draft"])
def test_kernels_and_logits_agree(
    weight: torch.Tensor,
    x: torch.Tensor,
    draft_vocab: torch.Tensor | None,
    quantization: Any,
    soft_cap: float | None,
    scale: float,
) -> None:
    target = make_target(weight * 0.1, scale, soft_cap)
    projection = HeadProjection(target, draft_vocab, quantization, torch.float32)
    other = None if draft_vocab is None else torch.linspace(-3, 3, len(x))
    assert not projection.use_kernels, "there is no Triton for a CPU"
    stored_token, stored_p = projection.top1(x, other)
    projection.use_kernels = True
    projection.logits = None  # type: ignore[assignment]
    token, p = projection.top1(x, other)
    assert torch.equal(token, stored_token)
    # 8-bit weights are multiplied before their scale here, after it there.
    torch.testing.assert_close(p, stored_p, rtol=1e-4, atol=1e-6)


def test_kernels_leave_a_quantised_target_alone(weight: torch.Tensor, x: torch.Tensor) -> None:
    target = quantised(make_target(weight))
    projection = HeadProjection(target, None, None, torch.float32)
    projection.use_kernels = True
    assert projection.kernel_weight(torch.float32) is None
    token, _ = projection.top1(x, None)
    assert torch.equal(token, target.compute_logits(x).argmax(-1))


def test_kernels_need_the_weights_dtype(weight: torch.Tensor) -> None:
    projection = HeadProjection(make_target(weight), None, None, torch.float32)
    assert projection.kernel_weight(torch.bfloat16) is None
    draft = HeadProjection(make_target(weight), DRAFT_VOCAB, None, torch.float32)
    assert draft.kernel_weight(torch.bfloat16) is None
    copy = HeadProjection(make_target(weight), DRAFT_VOCAB, "int8", torch.float32)
    assert copy.kernel_weight(torch.bfloat16) is not None


def shard_of(weight: torch.Tensor, rank: int, rows: int) -> Any:
    """The target as one of several tensor-parallel ranks holds it, padded to ``rows`` rows."""
    first, end = (min(at * rows, VOCAB) for at in (rank, rank + 1))
    part = torch.full((rows, HIDDEN), 1e6)
    part[: end - first] = weight[first:end]
    target = make_target(part)
    target.lm_head.tp_size, target.lm_head.tp_rank = -(-VOCAB // rows), rank
    target.lm_head.shard_indices = SimpleNamespace(
        org_vocab_start_index=first, org_vocab_end_index=end
    )
    return target


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What three ranks, which are asked one after the other, gather; the last one sees it all."""
    parts: list[torch.Tensor] = []

    def all_gather(part: torch.Tensor, dim: int) -> torch.Tensor:
        parts.append(part)
        return torch.cat(parts if len(parts) == 3 else [part] * 3, dim=dim)

    monkeypatch.setattr(lm_head, "tensor_model_parallel_all_gather", all_gather)
    return parts


def test_ranks_merge_what_they_found(
    weight: torch.Tensor, x: torch.Tensor, sent: list[torch.Tensor]
) -> None:
    """Three ranks, the last with padding: no logits are gathered."""
    for rank in range(3):
        projection = HeadProjection(shard_of(weight, rank, 40), None, None, torch.float32)
        projection.use_kernels = True
        token, p = projection.top1(x, None)
    stored_token, stored_p = top1_confidence(functional.linear(x, weight[:VOCAB]))
    assert torch.equal(token, stored_token)
    torch.testing.assert_close(p, stored_p, rtol=1e-5, atol=1e-7)
    assert [part.shape for part in sent] == [(len(x), 3)] * 3


@pytest.mark.parametrize(
    ("ids", "quantization"),
    [(None, "int8"), (DRAFT_VOCAB, None), (DRAFT_VOCAB, "int8"), (DRAFT_VOCAB[:5], None)],
    ids=["all-int8", "six", "six-int8", "five"],
)
def test_a_copy_is_spread_over_ranks(
    weight: torch.Tensor,
    x: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
    sent: list[torch.Tensor],
    ids: torch.Tensor | None,
    quantization: Any,
) -> None:
    """Three ranks, the last with fewer rows of five: together they say what one would."""
    alone = HeadProjection(make_target(weight), ids, quantization, torch.float32)
    token, p = alone.top1(x, None)
    # With the other ranks' help.
    monkeypatch.setattr(lm_head, "read_rows", lambda _, token_ids, dtype: weight[token_ids])
    ranks = [
        HeadProjection(shard_of(weight, rank, 40), ids, quantization, torch.float32)
        for rank in range(3)
    ]
    assert {rank.num_ranks() for rank in ranks} == {3}
    for name in ("rows", "scales") if quantization else ("rows",):
        whole = torch.cat([getattr(rank, name) for rank in ranks])
        assert torch.equal(whole, getattr(alone, name))
    for rank in ranks:
        logits = rank.logits(x)
    torch.testing.assert_close(logits, alone.logits(x))
    assert torch.equal(rank.over_all_tokens(logits).argmax(-1), token)
    sent.clear()
    for rank in ranks:
        rank.use_kernels = True
        found = rank.top1(x, None)
    assert torch.equal(found[0], token)
    torch.testing.assert_close(found[1], p, rtol=1e-5, atol=1e-7)
    assert [part.shape for part in sent] == [(len(x), 3)] * 3
    for rank in ranks:
        assert rank.rows is not None
        before = rank.rows.clone()
        rank.rows.zero_()
        rank.refresh()
        assert torch.equal(rank.rows, before)


def test_a_copy_that_is_too_small_is_whole_on_every_rank(
    weight: torch.Tensor, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_head, "read_rows", lambda _, ids, dtype: weight[ids].to(dtype))
    for rank in range(3):
        projection = HeadProjection(
            shard_of(weight, rank, 40), DRAFT_VOCAB[:4], None, torch.float32
        )
        assert projection.num_ranks() == 1
        assert torch.equal(projection.logits(x), functional.linear(x, weight[DRAFT_VOCAB[:4]]))


def test_a_rank_of_padding_alone_uses_logits(weight: torch.Tensor) -> None:
    for rank in range(2):
        target = shard_of(weight, rank, 60)
        target.lm_head.tp_size = 3
        projection = HeadProjection(target, None, None, torch.float32)
        assert projection.kernel_weight(torch.float32) is None


@pytest.mark.parametrize("is_quantised", [False, True], ids=["plain", "quantised"])
@pytest.mark.parametrize("token_ids", [None, DRAFT_VOCAB], ids=["all", "draft"])
@pytest.mark.parametrize(("num_ranks", "rows"), [(3, 40), (2, 60), (2, 100)])
def test_ranks_put_their_rows_together(
    weight: torch.Tensor,
    num_ranks: int,
    rows: int,
    token_ids: torch.Tensor | None,
    is_quantised: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last rank has some padding, or nothing else; what stands there is never read."""
    # What a rank adds is what it would have without the others.
    monkeypatch.setattr(lm_head_rows, "tensor_model_parallel_all_reduce", lambda part: part)
    parts = []
    for rank in range(num_ranks):
        target = shard_of(weight, rank, rows)
        target.lm_head.tp_size = num_ranks
        head = quantised(target).lm_head if is_quantised else target.lm_head
        parts.append(lm_head_rows.read_rows(head, token_ids, torch.float32))
    expected = weight[:VOCAB] if token_ids is None else weight[token_ids]
    assert torch.equal(torch.stack(parts).sum(0), expected)
    # And none adds what is another's.
    assert (torch.stack(parts).abs().sum(-1) > 0).sum(0).eq(1).all()
