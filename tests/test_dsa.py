"""Models with indexers of their own: the plan's runtime beside the model's code, sharing, HISA and MISA."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GlmMoeDsaForCausalLM

from sparsec.calibrate.corpus import read_corpus
from sparsec.calibrate.decode import decode_rows
from sparsec.calibrate.dsa_fit import capture, loss, own_weights
from sparsec.calibrate.patterns import share, with_pattern
from sparsec.calibrate.replay import Replay
from sparsec.calibrate.splits import Calibration
from sparsec.compiler.gate import Exam
from sparsec.compiler.recipe import Gate
from sparsec.errors import PlanError
from sparsec.export.dsa import settings, uniform
from sparsec.layout import TENSORS, read_plan
from sparsec.passes.indexcache import IndexCache
from sparsec.plan import Dsa, Plan
from sparsec.plugins.dsa_choice import choose, flat
from sparsec.plugins.families import base_plan, family_of
from sparsec.plugins.load import load
from sparsec.plugins.runtime import applied, stepping
from sparsec.plugins.step import Step

FAMILIES = ("deepseek_v32", "glm_moe_dsa")
TOKENS = 60


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, dsa_model: Callable[..., Any]) -> Any:
    return dsa_model(request.param)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 64, (2, TOKENS), generator=torch.Generator().manual_seed(0))


def patterned(plan: Plan, pattern: str) -> Plan:
    return with_pattern(plan, {i: {"F": "full", "S": "shared"}[letter] for i, letter in enumerate(pattern)})


def test_the_unchanged_plan_runs_as_the_models_own_code(model: Any, tokens: Tensor) -> None:
    expected = model(tokens).logits
    with applied(model, base_plan(model.config, "test")):
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(model(tokens).logits, expected)


def test_generation_with_padding_is_the_models_own(model: Any, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens)
    mask[0, :20] = 0
    asked = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(tokens, **asked)
    with applied(model, base_plan(model.config, "test")):
        assert torch.equal(model.generate(tokens, **asked), expected)


def test_sharing_is_that_of_transformers_own_shared_layers(dsa_model: Callable[..., Any], tokens: Tensor) -> None:
    model = dsa_model("glm_moe_dsa")
    theirs = dsa_model("glm_moe_dsa", indexer_types=["full", "shared", "full", "shared"])
    theirs.load_state_dict({k: v for k, v in model.state_dict().items() if k in theirs.state_dict()})
    with applied(model, patterned(base_plan(model.config, "test"), "FSFS")):
        found = model(tokens).logits
    torch.testing.assert_close(found, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, model(tokens).logits, atol=1e-3)
    # A source that shares already keeps doing so.
    plan = base_plan(theirs.config, "test")
    assert plan.pattern == "FSFS"
    with applied(theirs, plan):
        torch.testing.assert_close(theirs(tokens).logits, found, atol=1e-5, rtol=1e-5)
    assert theirs.model.layers[1].self_attn.indexer is None


def test_prefill_and_steps_are_one_pass_and_shared_layers_hold_no_index_keys(model: Any, tokens: Tensor) -> None:
    plan = patterned(base_plan(model.config, "test"), "FSSF")
    with applied(model, plan):
        whole = model(tokens).logits
        cache = None
        parts = []
        for piece in (tokens[:, :31], tokens[:, 31:32], tokens[:, 32:50], tokens[:, 50:]):
            answer = model(piece, past_key_values=cache, use_cache=True)
            cache = answer.past_key_values
            parts.append(answer.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    assert [layer.indexer_keys is not None for layer in cache.layers] == [True, False, False, True]


def test_replay_from_any_layer_is_the_whole_pass(model: Any, tokens: Tensor) -> None:
    plan = base_plan(model.config, "test")
    with applied(model, plan):
        replay = Replay(model, tokens[0], 30)
        assert torch.allclose(replay.losses, decode_rows(model, tokens[0], 30)[0], atol=1e-4)
    for layer in (1, 2, 3):
        with applied(model, share(plan, layer)):
            expected = decode_rows(model, tokens[0], 30)[0]
            torch.testing.assert_close(replay.run(layer).losses, expected, atol=1e-4, rtol=1e-4)


def indexed(seed: int = 0, keys: int = 200, heads: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, keys, heads, 16, generator=generator), torch.randn(2, keys, 16, generator=generator)
    w = torch.randn(2, keys, heads, generator=generator)
    return q, k, w, torch.ones(keys, keys, dtype=torch.bool).tril().expand(2, -1, -1)


def sets(found: Tensor, visible: Tensor) -> Tensor:
    return torch.zeros_like(visible).scatter_(-1, found.long(), True) & visible


def test_hisa_within_its_reach_is_the_flat_choice_and_beyond_it_is_algorithm_1() -> None:
    q, k, w, visible = indexed()
    plain = Dsa(top_k=12, heads=4, dim=16)
    hisa = Dsa.model_validate({**plain.model_dump(), "hisa": {"block": 16, "top_blocks": 3}})
    found, expected = sets(choose(q, k, w, visible, hisa), visible), sets(choose(q, k, w, visible, plain), visible)
    assert torch.equal(found[:, :48], expected[:, :48])
    assert not torch.equal(found, expected)
    scores = flat(q, k, w, visible)
    for row in (60, 111, 199):
        own = row // 16
        pooled = torch.stack([k[0, b * 16 : min((b + 1) * 16, row + 1)].mean(0) for b in range(own + 1)])
        ranks = (w[0, row] @ torch.relu(q[0, row] @ pooled.T)).topk(min(3, own + 1)).indices.tolist()
        inside = torch.zeros(200, dtype=torch.bool)
        for block in {*ranks, 0, own}:
            inside[block * 16 : (block + 1) * 16] = True
        best = scores[0, row].masked_fill(~inside, float("-inf")).topk(12).indices
        assert set(best.tolist()) == set(found[0, row].nonzero()[:, 0].tolist())


def test_what_does_not_compete_is_not_chosen_where_blocks_hold_too_few() -> None:
    q, k, w, visible = indexed(6, 40)
    dsa = Dsa.model_validate({"top_k": 8, "heads": 4, "dim": 16, "hisa": {"block": 4, "top_blocks": 2}})
    found = sets(choose(q, k, w, visible, dsa), visible)
    inside = found.unflatten(-1, (10, 4)).any(-1).sum(-1)
    assert inside.max() <= 4  # two, the first and the row's own
    assert found.sum(-1).min() == 1
    assert (found[:, 8:].sum(-1) < 8).any()  # the first and the own one were the best


def test_misa_routes_by_magnitude_and_its_second_stage_scores_with_all_heads() -> None:
    q, k, w, visible = indexed(1)
    plain = Dsa(top_k=12, heads=4, dim=16)
    expected = choose(q, k, w, visible, plain)
    every = Dsa.model_validate({**plain.model_dump(), "misa": {"heads": 4, "block": 32}})
    assert torch.equal(sets(choose(q, k, w, visible, every), visible), sets(expected, visible))
    one = Dsa.model_validate({**plain.model_dump(), "misa": {"heads": 1, "block": 32}})
    found = sets(choose(q, k, w, visible, one), visible)
    row, own = 150, 150 // 32
    pooled = torch.stack([k[1, b * 32 : min((b + 1) * 32, row + 1)].mean(0) for b in range(own + 1)])
    best = (w[1, row, :, None] * torch.relu(q[1, row] @ pooled.T)).abs().mean(-1).argmax()
    scores = w[1, row, best] * torch.relu(k[1, : row + 1] @ q[1, row, best])
    kept = scores[found[1, row, : row + 1]]
    assert kept.min() >= scores.topk(12).values[-1]
    two = Dsa.model_validate({**plain.model_dump(), "misa": {"heads": 1, "block": 32, "candidates": 200}})
    assert torch.equal(sets(choose(q, k, w, visible, two), visible), sets(expected, visible))


@pytest.mark.parametrize("way", [{"hisa": {"block": 8, "top_blocks": 3}}, {"misa": {"heads": 2, "block": 16}}])
def test_a_choice_never_depends_on_later_tokens_or_on_the_chunk(way: dict[str, Any]) -> None:
    q, k, w, visible = indexed(2, 90)
    dsa = Dsa.model_validate({"top_k": 10, "heads": 4, "dim": 16, **way})
    whole = sets(choose(q, k, w, visible, dsa), visible)
    for row in (20, 41, 63, 89):
        seen = slice(0, row + 1)
        part = (q[:, row : row + 1], k[:, seen], w[:, row : row + 1], visible[:, row : row + 1, seen])
        alone = sets(choose(*part, dsa), part[3])
        assert torch.equal(alone[:, 0], whole[:, row, seen])


def test_hisa_and_misa_together_and_their_length_gates() -> None:
    q, k, w, visible = indexed(3)
    both = {"hisa": {"block": 16, "top_blocks": 2}, "misa": {"heads": 2, "block": 32, "candidates": 20}}
    dsa = Dsa.model_validate({"top_k": 12, "heads": 4, "dim": 16, **both})
    found = sets(choose(q, k, w, visible, dsa), visible)
    assert torch.equal(found.sum(-1), visible.sum(-1).clamp_max(12))
    gates = {name: {**values, "min_context": 100} for name, values in both.items()}
    gated = sets(choose(q, k, w, visible, Dsa.model_validate({"top_k": 12, "heads": 4, "dim": 16, **gates})), visible)
    plain = sets(choose(q, k, w, visible, Dsa(top_k=12, heads=4, dim=16)), visible)
    assert torch.equal(gated[:, :100], plain[:, :100])
    assert torch.equal(gated[:, 100:], found[:, 100:])


@pytest.mark.parametrize("way", [{"hisa": {"block": 16, "top_blocks": 2}}, {"misa": {"heads": 12, "block": 16}}])
def test_blocks_of_padding_change_no_choice(way: dict[str, Any]) -> None:
    q, k, w, visible = indexed(4, 80, heads=16)  # so many that no two tokens score alike
    dsa = Dsa.model_validate({"top_k": 10, "heads": 16, "dim": 16, **way})
    expected = sets(choose(q, k, w, visible, dsa), visible)
    pad = torch.nn.functional.pad
    padded = pad(visible, (32, 0, 32, 0))
    inputs = (pad(q, (0, 0, 0, 0, 32, 0), value=3.0), pad(k, (0, 0, 32, 0), value=3.0), pad(w, (0, 0, 32, 0)))
    found = sets(choose(*inputs, padded, dsa), padded)
    assert not found[:, :, :32].any()
    assert torch.equal(found[:, 32:, 32:], expected)


@pytest.mark.parametrize(
    ("dsa", "words"),
    [
        ({"hisa": {"block": 8, "top_blocks": 1}}, "hold fewer tokens than the 10"),
        ({"misa": {"heads": 17, "block": 8}}, "an indexer has 16"),
        ({"misa": {"heads": 2, "block": 8, "candidates": 9}}, "fewer than the 10"),
    ],
)
def test_ways_that_cannot_hold_are_refused(dsa_config: Callable[..., Any], dsa: dict[str, Any], words: str) -> None:
    plan = base_plan(dsa_config("glm_moe_dsa", index_topk=10), "test")
    with pytest.raises(PlanError, match=words):
        plan.edit(dsa={**plan.dsa.model_dump(), **dsa})  # type: ignore[union-attr]


def test_the_uniform_rule_is_transformers_own_reading(dsa_config: Callable[..., Any]) -> None:
    """IndexCache's code skips layer i where max(i - 1, 0) % freq is not 0: layers 0 and 1 both have an indexer."""
    for freq in (2, 3, 4):
        kinds = ["full" if max(i - 1, 0) % freq == 0 else "shared" for i in range(24)]
        assert kinds[:2] == ["full", "full"]
        assert uniform(kinds) == (freq, 2)
        assert dsa_config("glm_moe_dsa", 24, index_topk_freq=freq).indexer_types == kinds
    glm52 = ["full" if i < 3 or (i - 2) % 4 == 0 else "shared" for i in range(78)]
    assert uniform(glm52) == (4, 3)
    read = dsa_config("glm_moe_dsa", 78, index_topk_freq=4, index_skip_topk_offset=3).indexer_types
    assert read == glm52
    assert uniform(["full", "shared", "full", "full"]) is None


@pytest.mark.parametrize("pattern", ["FSFS", "FFSS", "FSSF"])
def test_what_is_written_for_engines_is_read_back_as_the_plan(dsa_config: Callable[..., Any], pattern: str) -> None:
    config = dsa_config("glm_moe_dsa")
    plan = patterned(base_plan(config, "test"), pattern)
    source = {**config.to_dict(), "index_topk_freq": 7}
    written = settings(plan, source)
    assert written["index_topk_pattern"] == pattern
    kinds = [layer.index for layer in plan.layers]
    assert written["indexer_types"] == kinds
    only = {key: written[key] for key in ("index_topk_pattern", "index_topk_freq") if key in written}
    assert dsa_config("glm_moe_dsa", **only).indexer_types == kinds
    if "index_topk_freq" in written:
        rule = {key: written[key] for key in ("index_topk_freq", "index_skip_topk_offset")}
        assert dsa_config("glm_moe_dsa", **rule).indexer_types == kinds
    else:
        assert uniform(kinds) is None


def test_an_observer_sees_what_the_plain_indexer_would_choose(model: Any, tokens: Tensor) -> None:
    plan = base_plan(model.config, "test")
    other = plan.edit(dsa={**plan.dsa.model_dump(), "misa": {"heads": 1, "block": 16}})  # type: ignore[union-attr]
    seen: list[Any] = []
    with applied(model, other), stepping(Step(decode=True, observe=seen.append, beside=plan.dsa)):
        model(tokens)
    assert [each.layer for each in seen] == [0, 1, 2, 3]
    first = seen[0]
    assert torch.equal(first.keep.sum(-1), first.beside.sum(-1))
    assert not torch.equal(first.keep, first.beside)
    seen.clear()
    with applied(model, plan), stepping(Step(decode=True, observe=seen.append, beside=plan.dsa)):
        model(tokens)
    assert all(torch.equal(each.keep, each.beside) for each in seen)


def test_a_plan_with_heads_is_refused_on_such_a_model(model: Any) -> None:
    plan = base_plan(model.config, "test")
    with pytest.raises(PlanError, match="indexers of its own takes no others"):
        plan.edit(layers=[{"heads": (0, 1, 1, 1)}] * 4, window={"size": 8, "sinks": 1})
    with pytest.raises(PlanError, match="do not agree"), applied(model, Plan.dense(plan.model, "test")):
        pass


# The compiler's whole way


def compiled(cli: Any, source: Path, out: Path, passes: str, *more: str) -> Any:
    options = {
        "indexcache.context": 400,
        "indexcache.needles": 2,
        "indexcache.needle_words": 4,
        "indexcache.steps": 4,
        "indexcache.fit_windows": 1,
        "gate.context": 256,
        "gate.max_loss": 1,
    }
    settings = [
        f"--set={name}={value}" for name, value in options.items() if name.partition(".")[0] in f"{passes},gate"
    ]
    return cli("compile", source, "--passes", passes, *settings, *more, "-o", out)


@pytest.fixture(scope="module")
def shared(cli: Any, tiny_dsa: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dsa") / "shared"
    done = compiled(cli, tiny_dsa, out, "indexcache", "--keep", "50%")
    assert done.status == 0, done.err
    return out


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


def test_transformers_own_class_shares_as_the_artifact_says(shared: Path, tokens: Tensor) -> None:
    plan = read_plan(shared)
    assert plan.pattern.count("F") == 2
    stock, info = GlmMoeDsaForCausalLM.from_pretrained(shared, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert [layer.self_attn.indexer is not None for layer in stock.model.layers] == [c == "F" for c in plan.pattern]
    torch.testing.assert_close(load(shared).model(tokens).logits, stock(tokens).logits, atol=1e-5, rtol=1e-5)
    left = {name for name in stored(shared) if ".indexer." in name}
    assert {int(name.split(".")[2]) for name in left} == {i for i, c in enumerate(plan.pattern) if c == "F"}
    assert not (shared / TENSORS).exists()


def test_training_changes_the_kept_indexers_and_nothing_else(shared: Path, tiny_dsa: Path) -> None:
    before, after = stored(tiny_dsa), stored(shared)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    full = [i for i, letter in enumerate(read_plan(shared).pattern) if letter == "F"]
    assert changed <= {name for name in after if ".indexer." in name}
    assert {int(name.split(".")[2]) for name in changed} <= set(full)
    manifest = json.loads((shared / "manifest.json").read_text())
    trained = json.loads((shared / "measurements.json").read_text())["passes"][0]["measured"]["trained"]
    assert (trained["kl_trained"] < trained["kl_before"]) == (manifest["weights"] == "trained") == bool(changed)


def test_cheaper_indexers_are_written_as_engines_read_them(cli: Any, tiny_dsa: Path, tmp_path: Path) -> None:
    more = ["--set=hisa.block=16", "--set=misa.block=64", "--set=misa.two_stage=true"]
    done = compiled(cli, tiny_dsa, tmp_path / "out", "hisa,misa", *more)
    assert done.status == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[key] for key in ("use_hisa", "hisa_k_block_size", "hisa_block_topk")] == [True, 16, 4]
    keys = ("use_misa", "misa_use_qnorm", "misa_k_block_size", "misa_topk_heads", "misa_decode_topk_heads")
    assert [config[key] for key in keys] == [True, False, 64, 2, 2]
    assert config["misa_stage1_topk"] == 64
    assert "index_topk_pattern" not in config
    said = cli("inspect", tmp_path / "out").out
    assert "HISA      tokens of the best 4 blocks of 16, the first and the own one" in said
    assert "MISA      2 of 16 indexer heads a query, the best 64 tokens again with all" in said
    assert "HISA and MISA are not run" in said
    choice = json.loads((tmp_path / "out" / "measurements.json").read_text())["passes"][0]["measured"]["choice"]
    assert 0 < choice["iou"] < choice["recovered"] < 1
    assert "Blocks before tokens" in (tmp_path / "out" / "report.html").read_text()


def test_left_out_tensors_leave_the_index_of_shards(
    cli: Any, make_checkpoint: Callable[..., Path], dsa_config: Callable[..., Any], tmp_path: Path
) -> None:
    config = dsa_config("glm_moe_dsa", max_position_embeddings=1024, index_topk=16)
    source = make_checkpoint(config, max_shard_size="100KB")
    given = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    done = compiled(cli, source, tmp_path / "out", "indexcache", "--set=indexcache.pattern=FSSF")
    assert done.status == 0, done.err
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    gone = {name for name in given if ".layers.1.self_attn.indexer" in name or ".layers.2.self_attn.indexer" in name}
    assert set(index) == set(given) - gone == set(stored(tmp_path / "out"))
    assert load(tmp_path / "out").model.sparsec_plan.pattern == "FSSF"
    said = [(tmp_path / "out" / name).read_text() for name in ("report.html", "README.md")]
    assert "This pattern was given, nothing was searched" in said[0]
    for text in (*said, cli("inspect", tmp_path / "out").out):
        assert "every latent stays in the cache, 2 shared layers without index keys" in text
        assert "memory really saved" not in text


def test_dense_beside_an_artifact_that_lacks_indexers_is_the_source_with_all_of_them(
    cli: Any, tiny_dsa: Path, tmp_path: Path
) -> None:
    ask = ("--lengths", "256", "--prompts", "0", "--windows", "1", "--json")
    cells = {}
    for pattern in ("FFFF", "FSSS"):
        out = tmp_path / pattern
        more = ("--set=indexcache.steps=0", f"--set=indexcache.pattern={pattern}")
        done = compiled(cli, tiny_dsa, out, "indexcache", *more)
        assert done.status == 0, done.err
        found = cli("eval", out, *ask)
        assert found.status == 0, found.err
        cells[pattern] = [cell["bits_per_byte"] for cell in json.loads(found.out)["cells"]]
    assert cells["FSSS"][0] == cells["FFFF"][0] == cells["FFFF"][1]
    assert cells["FSSS"][1] != cells["FSSS"][0]


def test_deepseek_keeps_every_indexer_since_its_own_code_cannot_share(
    cli: Any, make_checkpoint: Callable[..., Path], dsa_config: Callable[..., Any], tmp_path: Path
) -> None:
    source = make_checkpoint(dsa_config("deepseek_v32", max_position_embeddings=1024, index_topk=16))
    done = compiled(cli, source, tmp_path / "out", "indexcache", "--set=indexcache.pattern=FSFS")
    assert done.status == 0, done.err
    assert set(stored(tmp_path / "out")) == set(stored(source))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["index_topk_pattern"] == "FSFS"
    assert "indexer_types" not in config
    found = cli("eval", tmp_path / "out", "--lengths", "256", "--prompts", "0", "--windows", "1", "--json")
    assert found.status == 0, found.err
    assert [cell["system"] for cell in json.loads(found.out)["cells"]] == ["dense", "artifact"]
    refused = cli("eval", tmp_path / "out", "--lengths", "256", "--systems", "dense,window")
    assert refused.status == 2
    assert "has no heads for 'window'" in refused.line


@pytest.mark.parametrize(
    ("passes", "words"),
    [
        ("rtpurbo", "rtpurbo needs a dense model"),
        ("window", "window needs a dense model"),
        ("indexcache,distill", "distill needs heads"),
    ],
)
def test_passes_for_dense_models_are_refused_before_the_model_is_opened(
    cli: Any, tiny_dsa: Path, tmp_path: Path, passes: str, words: str
) -> None:
    done = cli("compile", tiny_dsa, "--passes", passes, "-o", tmp_path / "out")
    assert done.status == 2
    assert words in done.line
    assert not (tmp_path / "out").exists()


def test_passes_for_such_models_are_refused_on_dense_ones(cli: Any, tiny_deep: Path, tmp_path: Path) -> None:
    for name in ("hisa", "misa"):
        done = cli("compile", tiny_deep, "--passes", name, "-o", tmp_path / "out")
        assert done.status == 2
        assert f"{name} needs a model with indexers of its own" in done.line


def test_the_multi_layer_loss_has_the_gradient_of_the_mean_target(model: Any, tokens: Tensor) -> None:
    """IndexCache, Proposition 1: only the indexer's own distribution depends on what is trained."""
    plan = patterned(base_plan(model.config, "test"), "FSSS")
    window = capture(model, plan, tokens[0], torch.arange(5, TOKENS, 3))
    weights = {part: x.requires_grad_() for part, x in own_weights(model, plan)[0].items()}
    interleaved = family_of(model.config).dsa == "interleaved"
    rows = torch.arange(len(window.rows))

    def gradient(layers: list[int]) -> list[Tensor]:
        found = torch.autograd.grad(loss(window, weights, layers, rows, interleaved), list(weights.values()))
        return list(found)

    several = gradient([0, 1, 2, 3])
    together = torch.stack([window.target[layer].float() for layer in range(4)]).mean(0)
    window.target[0] = together
    for one, other in zip(several, gradient([0]), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
    assert max(float(one.abs().max()) for one in several) > 1e-3


def test_search_and_gate_read_contexts_in_which_something_is_left_out(
    tiny_dsa: Path, dsa_config: Callable[..., Any]
) -> None:
    plan = base_plan(dsa_config("glm_moe_dsa", index_topk=64), "test")
    calibration = Calibration(read_corpus(), AutoTokenizer.from_pretrained(tiny_dsa))
    assert len(Exam.drawn(Gate(), plan, calibration, 0, readable=4096).windows[0]) == 256
    known = IndexCache(keep=0.5).cost(plan, 4096)
    assert known.tokens > IndexCache(keep=0.5, context=128).cost(plan, 4096).tokens
