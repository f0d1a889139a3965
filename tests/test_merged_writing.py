"""Merged tokens are written: texts keep their probabilities, an index finds what matters, generate() works as ever."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

import sparsec
from sparsec.calibrate.merged_embeddings import never_sampled
from sparsec.calibrate.merged_output import OutputSettings, States, fit_output, written_bits
from sparsec.errors import PlanError, UsageError
from sparsec.plan import Plan, Vocabulary
from sparsec.plugins.families import base_plan
from sparsec.plugins.merged_writing import (
    MERGES,
    OUTPUT,
    STATES,
    Among,
    LongestMatch,
    Spelling,
    Writer,
    base_tokens,
    writer_of,
    writing,
)
from sparsec.plugins.output_index import OutputIndex
from sparsec.plugins.vocabulary import INPUT, NEVER

# ab, abc (ab on), bc, cab (ca is none), and abab (of ab twice, whose beginning aba is none)
BASE = 5
PAIRS = torch.tensor([(0, 1), (5, 2), (1, 2), (2, 5), (5, 5)], dtype=torch.int32)
SPELLED = {5: (0, 1), 6: (0, 1, 2), 7: (1, 2), 8: (2, 0, 1), 9: (0, 1, 0, 1)}


@pytest.fixture(scope="module")
def spelling() -> Spelling:
    return Spelling(PAIRS, BASE)


def vocabulary(base: int, merged: int, width: int) -> Vocabulary:
    return Vocabulary(
        mode="static", base=base, merged=merged, rows=base + merged + 3, width=width, boundary="phrase", write="merged"
    )


def test_what_goes_on_with_what(spelling: Spelling) -> None:
    assert {token: spelling.pieces(token) for token in SPELLED} == SPELLED
    assert spelling.parents.tolist() == [0, 5, 1, 2, 5]
    assert spelling.beginnings([0, 1, 0, 1, 2]) == [0, 5, 9]
    assert spelling.longest([0, 1, 2, 0, 1, 0, 1, 3]) == [6, 9, 3]
    assert spelling.longest([2, 0, 0, 1]) == [2, 0, 5]


class Chain:
    """A language of five letters whose next one depends on the last two: a base model that can be counted out."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.next = torch.rand(BASE + 1, BASE + 1, BASE, generator=generator).pow(2).softmax(-1).log()

    def logp(self, before: tuple[int, ...], token: int) -> float:
        one, two = (BASE, BASE, *before)[-2:]
        return float(self.next[one, two, token])


def likely(spelling: Spelling, chain: Chain, written: list[int]) -> torch.Tensor:
    """The distribution over all tokens behind ``written``, by the real writer on rows that are right."""
    before = tuple(piece for token in written for piece in spelling.pieces(token))
    joint = []
    for token in range(BASE + len(SPELLED)):
        pieces = spelling.pieces(token)
        joint.append(sum(chain.logp(before + pieces[:at], piece) for at, piece in enumerate(pieces)))
    logits = torch.tensor(joint)
    # With one state, h = 1, the rows are the logits.
    tensors = {OUTPUT: logits[BASE:, None], STATES: torch.ones(1, 1), MERGES: PAIRS}
    writer = Writer(logits[:BASE, None], vocabulary(BASE, len(SPELLED), 1), tensors)
    scores = writer(torch.ones(1, 1))
    return LongestMatch(writer, 0)(torch.tensor([written], dtype=torch.long), scores)[0].softmax(-1)


def test_every_text_keeps_its_probability(spelling: Spelling) -> None:
    chain = Chain()
    for text in itertools.product(range(BASE), repeat=4):
        written = spelling.longest(text)
        # The last token may be the beginning of a longer one: then all that begin with it are the text.
        head, last = written[:-1], spelling.pieces(written[-1])
        found = 0.0
        for number, token in enumerate(head):
            found += float(likely(spelling, chain, head[:number])[token].log())
        ends = likely(spelling, chain, head)
        found += float(
            sum(
                ends[token] for token in range(len(SPELLED) + BASE) if spelling.pieces(token)[: len(last)] == last
            ).log()
        )
        if spelling.open(head):
            continue  # a longer token that began earlier may still come: its share is not in this sum
        expected = sum(chain.logp(text[:at], piece) for at, piece in enumerate(text))
        assert found == pytest.approx(expected, abs=1e-3), (text, written)


def test_a_text_has_one_spelling(spelling: Spelling) -> None:
    chain = Chain()
    behind_a = likely(spelling, chain, [0])
    assert behind_a[[1, 7]].tolist() == [0, 0]  # b, and bc: that would have been ab
    assert likely(spelling, chain, [2])[[5, 6, 9]].tolist() == [0, 0, 0]  # ca on: cab
    assert likely(spelling, chain, [2])[0] > 0
    assert likely(spelling, chain, [2, 0])[1] == 0
    assert likely(spelling, chain, [5, 0])[1] == 0  # abab
    assert likely(spelling, chain, [5])[2] == 0  # abc
    assert float(likely(spelling, chain, []).sum()) == pytest.approx(1, abs=1e-6)


def test_the_prompt_rules_nothing_out() -> None:
    tensors = {OUTPUT: torch.zeros(5, 1), STATES: torch.ones(1, 1), MERGES: PAIRS}
    writer = Writer(torch.zeros(BASE, 1), vocabulary(BASE, 5, 1), tensors)
    scores = writer(torch.ones(2, 1))
    before = scores.isfinite()
    assert torch.equal(LongestMatch(writer, 2)(torch.tensor([[3, 0], [3, 3]]), scores.clone()).isfinite(), before)
    assert not torch.equal(LongestMatch(writer, 1)(torch.tensor([[3, 0], [3, 3]]), scores).isfinite(), before)


def test_merged_tokens_never_take_more_than_there_is() -> None:
    tensors = {
        OUTPUT: torch.tensor([[9.0], [8.0]]),
        STATES: torch.ones(1, 1),
        MERGES: torch.tensor([(0, 1), (0, 2)]).int(),
    }
    plain = torch.tensor([[1.0], [0.5], [0.0]])
    writer = Writer(plain, vocabulary(3, 2, 1), tensors)
    logits = writer(torch.ones(1, 1))[0]
    assert float(logits[[0, 3, 4]].logsumexp(0)) == pytest.approx(1.0, abs=1e-4)
    assert logits[1:3].tolist() == [0.5, 0.0]
    assert (logits[5:] == -torch.inf).all()


@pytest.fixture(scope="module")
def many() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths, and hidden states that do not vary in all directions alike."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 30, generator=generator) * torch.rand(20_000, 1, generator=generator)
    states = torch.randn(500, 30, generator=generator) * torch.linspace(3, 0.1, 30)
    return rows, states


def test_the_index_finds_the_largest_inner_products(many: tuple[torch.Tensor, torch.Tensor]) -> None:
    pytest.importorskip("faiss")
    rows, states = many
    index = OutputIndex(rows, states[:400].T @ states[:400] / 400, exact=1000, candidates=512)
    assert not index.all
    numbers, logits = index(states[400:])
    exact = states[400:] @ rows.T
    assert torch.allclose(logits, exact.gather(1, numbers), atol=1e-4)  # of the rows themselves
    best = exact.topk(10, dim=-1).indices
    assert float((best[:, :1, None] == numbers[:, None]).any(-1).float().mean()) == 1.0
    assert float((best[..., None] == numbers[:, None]).any(-1).float().mean()) > 0.97
    # By cosine it would be others: the longest rows are what is found.
    assert float(rows[numbers].norm(dim=-1).mean()) > 1.1 * float(rows.norm(dim=-1).mean())


def test_few_rows_are_all_multiplied(many: tuple[torch.Tensor, torch.Tensor]) -> None:
    rows, states = many
    numbers, logits = OutputIndex(rows, torch.eye(30))(states[:3])
    assert torch.equal(numbers[1], torch.arange(len(rows)))
    assert torch.allclose(logits, states[:3] @ rows.T, atol=1e-4)


def test_many_rows_need_faiss(many: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UsageError, match="pip install 'sparsec\\[index\\]'"):
        OutputIndex(many[0], torch.eye(30), exact=1000)


def test_rows_learn_what_follows() -> None:
    """A base model whose next token is a function of the hidden state, of which the next hidden state is another."""
    generator = torch.Generator().manual_seed(0)
    width, base = 8, 6
    head = torch.randn(base, width, generator=generator)
    windows = []
    for _ in range(60):
        state, hidden, tokens = torch.randn(width, generator=generator), [], [0]
        for _ in range(64):
            state = torch.cat([torch.ones(1), 0.9 * state[1:] + 0.3 * torch.randn(width - 1, generator=generator)])
            hidden.append(state)
            tokens.append(int(torch.multinomial((head @ state).softmax(-1), 1, generator=generator)))
        windows.append((torch.tensor(tokens[:64]), torch.stack(hidden)))
    hidden = torch.stack([one[1] for one in windows])
    states = States(torch.stack([one[0] for one in windows]), hidden, (hidden @ head.T).logsumexp(-1))
    train, held = (
        States(*(part[few] for part in (states.tokens, states.hidden, states.total)))
        for few in (slice(50), slice(50, 60))
    )
    merges = torch.tensor([(1, 2), (3, 4), (6, 5)], dtype=torch.int32)
    spelling = Spelling(merges, base)
    rows, moments, found = fit_output(spelling, head, train, held, OutputSettings(150, own_lr=1e-2))
    losses = [check["loss"] for check in found["checks"]]
    assert min(losses) < 0.9 * losses[0]
    writer = Writer(head, vocabulary(base, 3, width), {OUTPUT: rows, STATES: moments, MERGES: merges})
    cost = written_bits(writer, held)
    assert cost["steps"] < cost["tokens"]
    assert cost["bits_merged"] == pytest.approx(cost["bits_base"], rel=0.03)


@pytest.fixture(scope="module")
def installed(tiny_llama: Path) -> tuple[Any, Plan]:
    """A small model that writes three merged tokens, one of them often."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval().requires_grad_(False)
    rows, width = model.get_input_embeddings().weight.shape
    own = {"mode": "static", "base": rows, "merged": 3, "rows": 320, "width": width, "boundary": "phrase"}
    plan = base_plan(model.config, "test").edit(vocabulary={**own, "write": "merged"})
    torch.manual_seed(0)
    merges = torch.tensor([(70, 71), (272, 72), (80, 81)], dtype=torch.int32)
    head = model.get_output_embeddings().weight
    never = never_sampled(model.get_decoder()(torch.arange(3, 200)[None]).last_hidden_state[0], head)
    made = {INPUT: torch.randn(3, width), NEVER: never, OUTPUT: head[[70, 70, 80]].clone()}
    sparsec.install(model, plan, made | {STATES: torch.eye(width), MERGES: merges})
    return model, plan


def test_generate_writes_over_the_large_vocabulary(installed: tuple[Any, Plan]) -> None:
    model, plan = installed
    ids = torch.arange(3, 40)[None]
    options = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    torch.manual_seed(0)
    out = model.generate(ids.expand(4, -1), **options, temperature=3.0)[:, 37:]
    assert plan.vocabulary is not None
    assert ((out >= 272) & (out < 275)).any()
    assert (out < 275).all()
    plain = model(ids, use_cache=False).logits  # outside of generate() logits are what they were
    assert plain[..., :272].isfinite().all()
    with base_tokens(), writing(model):
        assert torch.equal(model(ids, use_cache=False).logits, plain)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_sampling_parameters_mean_what_they_mean(installed: tuple[Any, Plan]) -> None:
    model, _ = installed
    ids = torch.arange(3, 40)[None]
    options = {"max_new_tokens": 1, "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}
    with writing(model):
        logits = model(ids, use_cache=False).logits[0, -1]
    warm = model.generate(ids, **options, do_sample=True, temperature=2.0, top_k=0).scores[0][0]
    assert torch.allclose(warm[logits.isfinite()], logits[logits.isfinite()] / 2, atol=1e-5)
    few = model.generate(ids, **options, do_sample=True, top_k=7).scores[0][0]
    assert set(few.isfinite().nonzero()[:, 0].tolist()) == set(logits.topk(7).indices.tolist())
    some = model.generate(ids, **options, do_sample=True, top_k=0, top_p=0.5).scores[0][0]
    sure = logits.softmax(-1).sort(descending=True)
    count = int((sure.values.cumsum(0) < 0.5).sum()) + 1
    assert set(some.isfinite().nonzero()[:, 0].tolist()) == set(sure.indices[:count].tolist())
    again = torch.cat([ids, torch.tensor([[272, 273, 10]])], 1)
    with writing(model):
        logits = model(again, use_cache=False).logits[0, -1]
    penal = model.generate(again, **options, do_sample=False, repetition_penalty=1.5).scores[0][0]
    seen = logits[[272, 273]]
    assert torch.allclose(penal[[272, 273]], torch.where(seen < 0, seen * 1.5, seen / 1.5), atol=1e-5)
    greedy = model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]
    with writing(model):
        assert int(greedy) == int(model(ids, use_cache=False).logits[0, -1].argmax())


def test_the_cache_goes_on_as_one_pass_would(installed: tuple[Any, Plan]) -> None:
    model, _ = installed
    torch.manual_seed(1)
    ids = torch.arange(3, 40)[None]
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": True, "temperature": 3.0, "top_k": 0}
    cache = DynamicCache(config=model.config)
    found = model.generate(
        ids, **options, pad_token_id=0, past_key_values=cache, return_dict_in_generate=True, output_logits=True
    )
    with writing(model):
        whole = model(found.sequences, use_cache=False).logits[0, 36:-1]
    steps = torch.cat(found.logits)
    real = whole.isfinite()
    assert torch.equal(real, steps.isfinite())
    assert torch.allclose(whole[real], steps[real], atol=1e-3)
    assert cache.get_seq_length() == found.sequences.shape[1] - 1


def test_beams_write_merged_tokens_too(installed: tuple[Any, Plan]) -> None:
    model, _ = installed
    out = model.generate(torch.arange(3, 40)[None], num_beams=3, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert out.shape[1] > 37


def test_processors_on_what_can_be_written_alone_change_nothing_else() -> None:
    from transformers import TopPLogitsWarper

    scores = torch.randn(2, 50)
    scores[:, 20:] = -torch.inf
    assert torch.equal(Among([TopPLogitsWarper(0.6)])(None, scores), TopPLogitsWarper(0.6)(None, scores))


def test_heads_that_are_not_linear_are_refused(installed: tuple[Any, Plan]) -> None:
    model, plan = installed
    kept = dict(model.sparsec_output)
    assert writer_of(model) is writer_of(model)
    tensors = {**kept, INPUT: model.get_input_embeddings().weight[272:275], NEVER: model.lm_head.weight[272]}
    wrong = {**tensors, MERGES: torch.tensor([(70, 71), (274, 72), (80, 81)], dtype=torch.int32)}
    other = AutoModelForCausalLM.from_config(model.config.__class__(**{**model.config.to_dict(), "vocab_size": 272}))
    with pytest.raises(PlanError, match="names tokens that are not there"):
        sparsec.install(other, plan, wrong)
    other.config.final_logit_softcapping = 30.0
    with pytest.raises(PlanError, match="take write=base"):
        sparsec.install(other, plan, tensors)
    assert other.get_input_embeddings().weight.shape[0] == 272  # nothing was put on it


def test_plans_that_write_base_tokens_are_what_they_were(installed: tuple[Any, Plan]) -> None:
    _, plan = installed
    assert plan.to_json()["vocabulary"]["write"] == "merged"
    assert Plan.parse(plan.to_json()) == plan
    base = plan.edit(vocabulary={**plan.to_json()["vocabulary"], "write": "base"})
    assert "write" not in base.to_json()["vocabulary"]


@pytest.fixture(scope="module")
def artifact(cli: Any, tiny_deep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model compiled to write merged tokens, with windows on top."""
    out = tmp_path_factory.mktemp("written") / "out"
    options = {"merges": 100, "prediction": "mean", "write": "merged", "write_steps": 20, "windows": 16, "context": 128}
    chosen = [f"--set=dynamic-tokenization.{name}={value}" for name, value in options.items()]
    gate = ["--set=window.window=64", "--set=gate.max_loss=9", "--set=gate.context=256", "--set=gate.rows=64"]
    result = cli("compile", str(tiny_deep), "--passes", "window,dynamic-tokenization", *chosen, *gate, "-o", str(out))
    assert result.status == 0, result.err
    return out


def test_an_artifact_writes_merged_tokens_and_others_base_ones(artifact: Path, tmp_path: Path) -> None:
    model, tokenizer = sparsec.load(artifact)
    text = tokenizer("the value of the function is the same", return_tensors="pt")
    torch.manual_seed(0)
    options = {"max_new_tokens": 200, "min_new_tokens": 200, "do_sample": True, "temperature": 2.0, "top_k": 0}
    out = model.generate(**text, **options)[0, text["input_ids"].shape[1] :]
    assert (out >= 272).any()
    assert (out < 372).all()
    from transformers import LlamaForCausalLM

    stock = LlamaForCausalLM.from_pretrained(artifact)
    assert (stock.generate(**text, **options)[0, text["input_ids"].shape[1] :] < 272).all()
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    other, _ = sparsec.load(tmp_path / "again")
    with writing(model), writing(other):
        assert torch.equal(
            model(text["input_ids"], use_cache=False).logits, other(text["input_ids"], use_cache=False).logits
        )


def test_the_artifact_says_what_it_writes(artifact: Path, cli: Any, tmp_path: Path) -> None:
    found = json.loads((artifact / "measurements.json").read_text())["passes"][0]["measured"]["written"]
    assert found["steps"] < found["tokens"]
    assert "read and written" in (artifact / "report.html").read_text(encoding="utf-8")
    assert json.loads((artifact / "config.json").read_text())["sparsec_config"]["vocabulary"]["write"] == "merged"
    assert "written by sparsec" in (artifact / "report.html").read_text(encoding="utf-8")
    result = cli("generate", str(artifact), "the value of the function", "--json", "--raw", "--max-new-tokens", "20")
    assert result.status == 0, result.err
    assert json.loads(result.out)["new_tokens"] == 20
    result = cli("verify", str(artifact), "--quick")
    assert result.status == 0, result.err
    few = ["--lengths", "256", "--prompts", "0", "--windows", "1", "--systems", "dense,artifact"]
    result = cli("eval", str(artifact), *few, "-o", str(tmp_path / "eval.json"))
    assert result.status == 0, result.err
    result = cli("export", str(artifact), "--to", "onnx")
    assert result.status == 1
    assert AutoTokenizer.from_pretrained(artifact)


def test_tokens_of_a_batch_are_not_written(cli: Any, tiny_deep: Path, tmp_path: Path) -> None:
    chosen = ["--set=dynamic-tokenization.mode=dynamic", "--set=dynamic-tokenization.write=merged"]
    result = cli("compile", str(tiny_deep), "--passes", "dynamic-tokenization", *chosen, "-o", str(tmp_path / "out"))
    assert result.status == 2
    assert "take mode=static, or write=base" in result.err
