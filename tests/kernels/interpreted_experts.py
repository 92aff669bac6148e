"""kernels/routing.py and nf4_experts.py in Triton's interpreter, as test_experts.py runs them."""

import os

import pytest
import torch

from grpo.kernels import expert_rows, mxfp4, nf4, nf4_experts, routing
from grpo.kernels import experts as plain
from grpo.kernels.glu import ACTIVATIONS, glu_forward
from grpo.kernels.nf4_tiles import Tile

assert os.environ.get("TRITON_INTERPRET") == "1", "pytest tests/kernels/test_experts.py runs this file"


def logits_of(tokens, experts, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)]).float()
    return (spread / 8).to(dtype)  # no two of a token are equal


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 4), (5, 12, 3), (40, 16, 2), (2, 4, 1)])
@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_and_weights_are_those_of_the_torch_form(tokens, experts, top_k, renormalize):
    logits = logits_of(tokens, experts)
    for _ in range(2):  # the counters are zeros again
        routes = routing.choose(logits, top_k, renormalize, 16)
        weights, chosen = plain.route(logits, top_k, renormalize)
        assert torch.equal(routes.chosen.long(), chosen)
        torch.testing.assert_close(routes.weights, weights, rtol=0.01, atol=1e-3)
        assert not routing.counters(logits.device, experts).any()


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 16, 4), (100, 4, 2), (33, 128, 8)])
def test_every_pair_has_one_place_among_its_experts_rows(tokens, experts, top_k):
    logits = logits_of(tokens, experts, seed=tokens)
    routes = routing.choose(logits, top_k, True, 16)
    chosen = routes.chosen.reshape(-1)
    order, ends = routes.order.long(), routes.ends.tolist()
    assert sorted(order.tolist()) == list(range(tokens * top_k))
    assert torch.equal(order[routes.place.long()], torch.arange(tokens * top_k))
    assert ends == plain.group(routes.chosen.long(), experts).ends.tolist()
    starts = [0, *ends[:-1]]
    for expert in range(experts):
        assert (chosen[order[starts[expert] : ends[expert]]] == expert).all()
    covered = []
    for expert, start in zip(routes.expert.tolist(), routes.start.tolist(), strict=True):
        if expert < experts:
            assert starts[expert] <= start < ends[expert]
            covered += range(start, min(start + 16, ends[expert]))
    assert sorted(covered) == list(range(tokens * top_k))


def test_what_is_chosen_is_kept_beside_each_tokens_slot():
    logits = logits_of(20, 12)
    table = torch.full((30, 2, 3), 99, dtype=torch.uint8)
    slots = torch.arange(25).roll(3)
    slots[4] = -1
    record = routing.Record(table.clone(), slots, 1)
    routes = routing.choose(logits, 3, True, 16, record)
    expected = routing.Record(table.clone(), slots, 1)
    expected.write(routes.chosen)
    kept = [slot for slot in slots[:20].tolist() if slot >= 0]
    assert torch.equal(record.table[kept, 1].int(), routes.chosen[slots[:20] >= 0])
    assert torch.equal(record.table[:-1], expected.table[:-1]), "the last slot is nobody's"
    others = [slot for slot in range(29) if slot not in kept]
    assert (record.table[others] == 99).all() and (record.table[:, 0] == 99).all()


def made(experts, features, columns, dtype):
    packed, absmax = nf4.allocate(experts * features, columns, dtype, "cpu")
    generator = torch.Generator().manual_seed(features)
    nf4.quantize_rows(packed, absmax, 0, torch.randn(experts * features, columns, generator=generator) * 0.1)
    return packed, absmax


TILES = [Tile(64, 16, 4, 2, 2), Tile(64, 16, 4, 2, 1), Tile(128, 32, 4, 3, 2)]


@pytest.mark.parametrize(
    ("tile", "experts", "features", "columns", "tokens", "top_k", "dtype"),
    [
        (TILES[0], 8, 64, 128, 3, 4, torch.bfloat16),
        (TILES[1], 3, 136, 192, 20, 2, torch.float16),
        (TILES[1], 4, 96, 64, 1, 3, torch.bfloat16),
        (TILES[2], 4, 136, 192, 20, 2, torch.bfloat16),
    ],
)
def test_products_are_those_of_dequantised_experts_rounded_once(tile, experts, features, columns, tokens, top_k, dtype):
    weight = made(experts, features, columns, dtype)
    dense = nf4.dequantize(*weight).double().view(experts, features, columns)
    torch.manual_seed(0)
    x = torch.randn(tokens, columns).to(dtype)
    bias, a = torch.randn(experts, features).to(dtype), (torch.randn(experts, 16, columns) * 0.1).to(dtype)
    b = torch.randn(experts, features, 16).to(dtype)
    routes = routing.choose(logits_of(tokens, experts, dtype), top_k, True, tile.m)
    one = torch.ones((), dtype=dtype)
    _, shrunk = nf4_experts.experts_sums(x, *weight, a, one, routes, tile, top_k=top_k)
    matrix = plain.ExpertMatrix(*weight, experts, bias)
    y = nf4_experts.product(x, matrix, plain.ExpertAdapter(a, b), one, routes, tile, top_k=top_k)
    rows = x[routes.order.long() // top_k]
    expert = routes.chosen.reshape(-1)[routes.order.long()].long()
    wanted = torch.einsum("mk,mnk->mn", rows.double(), dense[expert])
    low = torch.einsum("mk,mrk->mr", rows.double(), a.double()[expert])
    torch.testing.assert_close(shrunk.double(), low, rtol=0.01, atol=0.01)
    total = wanted + torch.einsum("mr,mnr->mn", shrunk.double(), b.double()[expert]) + bias.double()[expert]
    assert float((y.double() - total).norm() / total.norm()) < (2.5e-3 if dtype == torch.bfloat16 else 4e-4)
    plain_y = nf4_experts.experts_linear(x, *weight, routes, tile, top_k=top_k)
    sorted_y = nf4_experts.experts_linear(rows.contiguous(), *weight, routes, tile)
    assert torch.equal(plain_y, sorted_y)
    for glu in ACTIVATIONS if features % 16 == 0 else ():
        gated = nf4_experts.experts_linear(x, *weight, routes, tile, top_k=top_k, glu=glu)
        close([gated], [glu_forward(plain_y, glu).double()], 1e-3)
    error = float((plain_y.double() - wanted).norm() / wanted.norm())
    assert error < (2.5e-3 if dtype == torch.bfloat16 else 4e-4)


def made_mx(experts, features, columns):
    generator = torch.Generator().manual_seed(features)
    rows = experts * features
    codes = torch.randint(0, 256, (rows, columns // 32, 16), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(120, 128, (rows, columns // 32), generator=generator, dtype=torch.uint8)
    packed, scales = mxfp4.allocate(rows, columns, "cpu")
    mxfp4.pack_rows(packed, scales, 0, codes, exponents)
    return packed, scales


@pytest.mark.parametrize(("rows", "columns"), [(8, 64), (72, 192), (64, 256)])
def test_mxfp4_is_dequantised_to_the_bits_of_the_torch_form(rows, columns):
    packed, scales = made_mx(1, rows, columns)
    ours = torch.empty(rows, columns, dtype=torch.bfloat16)
    mxfp4.launch_dequantize(packed, scales, ours, interpreted=True)
    assert torch.equal(ours.view(torch.int16), mxfp4.dequantize(packed, scales).view(torch.int16))


@pytest.mark.parametrize(("tile", "experts", "features", "columns"), [(TILES[0], 4, 24, 192), (TILES[1], 4, 40, 128)])
def test_a_layer_in_mxfp4_with_biases_is_that_of_its_values(tile, experts, features, columns):
    torch.manual_seed(0)
    bias = torch.randn(experts, 2 * columns).bfloat16(), torch.randn(experts, features * 8).bfloat16()
    above = plain.ExpertMatrix(*made_mx(experts, 2 * columns, features * 8), experts, bias[0])
    below = plain.ExpertMatrix(*made_mx(experts, features * 8, columns), experts, bias[1])
    layer = plain.Experts(above, below, "clamped_silu")
    x, logits = torch.randn(5, features * 8).bfloat16() * 0.05, logits_of(5, experts)
    tiles = nf4_experts.DecodeTiles(tile, tile)
    ours = nf4_experts.decode(x, logits, layer, 2, True, tiles=tiles)
    weights, chosen = plain.route(logits, 2, True)
    wanted = plain.sampled_mlp(x, layer, chosen, weights)
    assert float((ours.float() - wanted.float()).norm() / wanted.float().norm()) < 4e-3


def test_a_tile_that_loses_rows_is_not_taken(monkeypatch):
    monkeypatch.setattr(nf4_experts.cards, "card", lambda device: type("Card", (), {"dot_is_fast": True}))
    monkeypatch.setattr(nf4_experts, "CHECKED_TOKENS", (3,))
    monkeypatch.setattr(nf4_experts, "FEW", (TILES[0], TILES[1]))
    monkeypatch.setattr(nf4_experts, "MANY", (TILES[2],))
    matrices = [
        plain.ExpertMatrix(*made(4, features, columns, torch.bfloat16), 4) for features, columns in ((64, 64), (64, 64))
    ]
    experts = plain.Experts(*matrices, "silu")
    assert nf4_experts.find_tiles(experts, 2) == (TILES[0], TILES[2])
    right = nf4_experts.product

    def loses(*arguments, **named):
        y = right(*arguments, **named)
        if arguments[5] in wrong:
            y[-1] = 0
        return y

    monkeypatch.setattr(nf4_experts, "product", loses)
    wrong = {TILES[0]}
    assert nf4_experts.find_tiles(experts, 2, 16) == (TILES[1], TILES[2])
    wrong = {TILES[2]}
    assert nf4_experts.find_tiles(experts, 2) == (TILES[0], TILES[0])
    wrong = {TILES[0], TILES[1]}
    assert nf4_experts.find_tiles(experts, 2) == (TILES[2], TILES[2])
    wrong = set(TILES)
    assert nf4_experts.find_tiles(experts, 2) is None
    x = torch.randn(2, 64).bfloat16()
    assert not nf4_experts.serves(x, experts, 2)


@pytest.mark.parametrize("glu", ["", "silu", "gelu_tanh", "clamped_silu"])
def test_an_adapters_term_a_bias_and_an_activation_are_those_of_the_torch_form(glu):
    torch.manual_seed(0)
    routes = routing.choose(logits_of(9, 6), 2, True, 16)
    expert = routes.chosen.reshape(-1)[routes.order.long()].long()
    sums, shrunk = 4 * torch.randn(18, 144), torch.randn(18, 16).bfloat16()
    b, bias = torch.randn(6, 144, 16).bfloat16(), torch.randn(6, 144).bfloat16()
    ours = nf4_experts.finish(sums, shrunk, b, bias, routes, 16, glu)
    wanted = sums + torch.einsum("mr,mnr->mn", shrunk.float(), b.float()[expert]) + bias.float()[expert]
    wanted = glu_forward(wanted.bfloat16(), glu) if glu else wanted.bfloat16()
    assert float((ours.float() - wanted.float()).norm() / wanted.float().norm()) < 1e-3


def test_rows_are_added_with_their_weights():
    logits = logits_of(7, 8)
    routes = routing.choose(logits, 3, True, 16)
    rows = torch.randn(21, 200).bfloat16()
    wanted = torch.einsum("tk,tkc->tc", routes.weights.double(), rows[routes.place.long()].double().view(7, 3, 200))
    torch.testing.assert_close(nf4_experts.combine(rows, routes).double(), wanted, rtol=0.005, atol=0.005)


def in_torch(function, *arguments):
    """What `function`'s torch form gives in float64."""
    return function(
        *(each.double() if torch.is_tensor(each) and each.is_floating_point() else each for each in arguments)
    )


def close(ours, wanted, limit=3e-3):
    for one, right in zip(ours, wanted, strict=True):
        assert float((one.double() - right).norm() / right.norm()) < limit


def rows_of(tokens, top_k, columns):
    """(rows, weights, order, place) of random experts."""
    torch.manual_seed(tokens)
    chosen = torch.stack([torch.randperm(8)[:top_k] for _ in range(tokens)])
    order, _, place = plain.group(chosen, 8)
    return torch.randn(tokens * top_k, columns).bfloat16(), torch.rand(tokens, top_k).bfloat16(), order, place


@pytest.mark.parametrize(("tokens", "top_k", "columns"), [(7, 3, 200), (1, 1, 64), (5, 8, 1100)])
def test_sums_of_a_tokens_rows_and_their_gradients_are_those_of_the_torch_form(tokens, top_k, columns):
    rows, weights, order, place = rows_of(tokens, top_k, columns)
    for each in (weights, None):
        ours, wanted = (
            expert_rows.sum_rows(rows, each, place, top_k), in_torch(expert_rows.sum_rows, rows, each, place, top_k),
        )  # fmt: skip
        close([ours], [wanted])
    incoming = torch.randn(tokens, columns).bfloat16()
    arguments = incoming, rows, weights, order
    wanted = in_torch(expert_rows.spread_backward, *arguments)
    close(expert_rows.spread_backward(*arguments), wanted)
    leaves = rows.double().requires_grad_(), weights.double().requires_grad_()
    total = (leaves[0][place].view(tokens, top_k, columns) * leaves[1][..., None]).sum(1)
    by_rows, by_weights = torch.autograd.grad((total * incoming).sum(), leaves)
    close([wanted[0], wanted[1][place].view_as(weights)], [by_rows, by_weights], 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("rows", "inner"), [(6, 100), (1, 1100)])
def test_gradients_of_gates_and_of_a_rows_weight_are_those_of_the_torch_form(activation, rows, inner):
    torch.manual_seed(rows)
    grad, gate_up = torch.randn(rows, inner).bfloat16(), 4 * torch.randn(rows, 2 * inner).bfloat16()
    arguments = grad, gate_up, torch.rand(rows).bfloat16(), activation
    close(expert_rows.gated_backward(*arguments), in_torch(expert_rows.gated_backward, *arguments), 6e-3)
