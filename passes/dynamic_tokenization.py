"""dynamic-tokenization: tokens that the tokenizer never had, so that prompts take fewer positions.

Dynamic tokenization (Feher, Vulić, Minixhofer, arXiv 2411.18553) merges frequent neighbours of a batch and lets a
hypernetwork predict their embeddings: ``mode=dynamic``. By default (``static``) the merges are mined from the
calibration text once and frozen, which the paper's authors would call vocabulary extension, and every engine can serve
it. What is ours: docs/passes/dynamic-tokenization.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from sparsec.calibrate.consistency import consistency
from sparsec.calibrate.hypernetwork import imitate, new_hypernetwork
from sparsec.calibrate.merged_distillation import Rows, Settings, as_windows, distil
from sparsec.calibrate.merged_embeddings import estimate, never_sampled
from sparsec.calibrate.merged_output import OutputSettings, fit_output, read_states, written_bits
from sparsec.calibrate.merges import Mined, batch_share, mine_text, saved_share
from sparsec.calibrate.splits import Calibration
from sparsec.calibrate.zett import open_zett
from sparsec.errors import PlanError, UsageError
from sparsec.passes.base import Cost, Need, Pass, PassResult, Program, Tier
from sparsec.plan import Plan, Vocabulary
from sparsec.plugins.byte_level import ByteLevel
from sparsec.plugins.dynamic_merging import NETWORK
from sparsec.plugins.hypernetwork import Hypernetwork, Pieces, embeddings
from sparsec.plugins.merged_writing import MERGES, OUTPUT, Spelling, Writer, check_head
from sparsec.plugins.merged_writing import STATES as STATES_OF
from sparsec.plugins.vocabulary import INPUT, NEVER

MULTIPLE = 64  # embedding rows come in such numbers, as kernels like them
SHOWN = 40  # merged tokens that the report lists
PROBE = (4, 256)  # held-out windows, and tokens of each, that are read in several segmentations
BATCH_LEAST = 2  # merging by the batch takes every pair that is there twice, as the authors' code does
WRITTEN = (200, 24, 16)  # windows, of train, search and held-out text, for output rows
STATES = (4, 512)  # windows and tokens that the row which is never sampled is fitted on


class DynamicTokenization(Pass):
    """How many merges, how wide, and how their embeddings are found. Lengths are tokens."""

    name: ClassVar[str] = "dynamic-tokenization"
    tier: ClassVar[Tier] = "minutes"
    presets: ClassVar[Mapping[Tier, Mapping[str, Any]]] = {
        "training-free": {"prediction": "mean"},
        "minutes": {},
        "hours": {"imitation_steps": 2000, "steps": 2000, "windows": 8000, "batch": 16, "context": 512, "depth": None},
    }
    summary: ClassVar[str] = "merge frequent neighbours into new tokens, predict their embeddings, read fewer positions"
    source: ClassVar[str] = "Dynamic tokenization, arXiv 2411.18553"
    needs: ClassVar[tuple[Need, ...]] = ("a dense model",)

    mode: Literal["static", "dynamic"] = Field(
        default="static", description="merges frozen in the tokenizer, or found in each batch by sparsec.load alone"
    )
    merges: int = Field(default=5000, ge=1, le=1_000_000, description="merged tokens, at most; dynamic: to train with")
    batch_merges: int = Field(default=512, ge=1, le=1_000_000, description="dynamic: merged tokens of a batch, at most")
    boundary: Literal["pretoken", "word", "phrase"] = Field(
        default="phrase", description="what a merged token stays in: the tokenizer's pretoken, a word, up to 16 words"
    )
    least: int = Field(default=4, ge=2, description="a pair that the train text has less often is not merged")
    prediction: Literal["mean", "local", "global", "hybrid", "hypernetwork", "zett"] = Field(
        default="hypernetwork",
        description="of embeddings: mean of the pieces, TokenAdapt's, trained here, or ZeTT's",
    )
    zett: str | None = Field(
        default=None, description="prediction=zett: folder or Hub name of a hypernetwork of ZeTT for this base model"
    )
    imitation_steps: int = Field(default=200, ge=0, description="steps on tokens that the vocabulary has")
    steps: int = Field(default=60, ge=0, description="steps against the model on unmerged text")
    batch: int = Field(default=4, ge=1, description="windows a step")
    windows: int = Field(default=400, ge=1, description="different windows, at most as many as the text has")
    context: int = Field(default=256, ge=32, description="base tokens a window")
    depth: int | None = Field(
        default=8, ge=1, description="layers behind which both are compared; null: all, and next tokens too"
    )
    write: Literal["base", "merged"] = Field(
        default="base",
        description="what is generated: tokens of the base vocabulary, or merged ones too",
    )
    write_steps: int = Field(default=200, ge=0, description="write=merged: steps of the new output rows alone")
    lr: float = Field(default=5e-4, gt=0, description="peak rate of the hypernetwork")
    row_lr: float = Field(default=3e-3, ge=0, description="of a correction to each row; 0: none")

    def tier_of_run(self) -> Tier:
        """Heuristics train nothing; all layers are for a GPU."""
        if self.prediction != "hypernetwork":
            return "minutes" if self.write == "merged" and self.write_steps else "training-free"
        return "minutes" if self.depth is not None else "hours"

    def run(self, program: Program, calibration: Calibration) -> PassResult:
        """Mine, predict, perhaps train. See :class:`sparsec.passes.base.Pass`."""
        if program.plan.vocabulary is not None:
            raise PlanError("the plan has merged tokens already: run dynamic-tokenization once")
        if self.mode == "dynamic" and self.prediction not in ("mean", "hypernetwork"):
            raise UsageError(f"prediction={self.prediction} is for frozen merges: take mean or hypernetwork in a batch")
        if (self.prediction == "zett") != (self.zett is not None):
            raise UsageError("prediction=zett and zett=FOLDER go together: set both, or neither")
        model = program.model
        if self.write == "merged":
            if self.mode == "dynamic":
                raise UsageError("write=merged is for frozen merges: take mode=static, or write=base")
            check_head(model)
        table, head, tied = embeddings(model)
        opened = None
        if self.zett is not None:
            opened = open_zett(self.zett, ByteLevel.of(calibration.tokenizer), table.shape[1], len(table), tied)
        mined = mine_text(
            calibration,
            self.merges,
            first=len(table),
            boundary=self.boundary,
            least=self.least,
            listen=program.listen,
        )
        trained: dict[str, Any] = {}
        if self.prediction == "hypernetwork":
            fitted, trained = self._trained(program, calibration, mined)
            rows, network = fitted.all(), fitted.network
        elif opened is not None:
            names = {token: word for word, token in mined.base.vocabulary.items()}
            words = ["".join(names[part] for part in parts) for parts in mined.constituents]
            rows, network = opened.rows(words, table, head, tied), None
        else:
            network = None
            size = mined.base.bytes_of
            lengths = [[len(size[part] or b"") for part in parts] for parts in mined.constituents]
            assert self.prediction != "zett"  # without its folder it is refused
            rows = estimate(self.prediction, table, mined.constituents, lengths)
        if self.mode == "dynamic":
            return self._by_batch(program, calibration, network, trained)
        never = never_sampled(self._states(model, calibration, program.seed), head)
        count = len(mined.merges)
        vocabulary = {
            "mode": "static",
            "base": len(table),
            "merged": count,
            "rows": -(-(len(table) + count) // MULTIPLE) * MULTIPLE,
            "width": table.shape[1],
            "boundary": self.boundary,
            "write": self.write,
        }
        held = saved_share(mined, calibration.tokenizer, [one.text for one in calibration.texts("heldout")])
        measured = {
            "merges": count,
            "boundary": self.boundary,
            "prediction": self.prediction,
            "tied": tied,
            "pairs": [list(merge[:2]) for merge in mined.merges],
            "mined_from": mined.tokens,
            "saved_train": sum(mined.saved) / max(1, mined.tokens),
            "heldout": held,
            "consistency": self._probe(program, calibration, mined, rows),
            "first": [data.decode("utf-8", "replace") for data in mined.spelling[:SHOWN]],
            **trained,
        }
        tensors: dict[str, Tensor] = {INPUT: rows.float().cpu().contiguous(), NEVER: never.cpu().contiguous()}
        if self.write == "merged":
            output, measured["written"] = self._written(program, calibration, mined, head, vocabulary)
            tensors |= output
        return PassResult(program.plan.edit(vocabulary=vocabulary), {**program.tensors, **tensors}, measured)

    def adds_tensors(self) -> bool:
        """What writes merged tokens, or merges by the batch; frozen rows become the model's own embeddings."""
        return self.write == "merged" or (self.mode == "dynamic" and self.prediction == "hypernetwork")

    def cost(self, plan: Plan, max_positions: int) -> Cost:
        """A step is a teacher's forward, and a forward and a backward to the embeddings, of a share of the layers."""
        states = STATES[0] * STATES[1]
        if self.write == "merged":
            states += (min(self.windows, WRITTEN[0]) + WRITTEN[1] + WRITTEN[2]) * self.context
        if self.prediction != "hypernetwork":
            return Cost(tokens=states)
        share = 1.0 if self.depth is None else min(1.0, self.depth / plan.model.layers)
        return Cost(tokens=states + int(4 * self.steps * self.batch * self.context * share))

    def _by_batch(
        self,
        program: Program,
        calibration: Calibration,
        network: Hypernetwork | None,
        trained: Mapping[str, Any],
    ) -> PassResult:
        """The plan that merges each batch, with the hypernetwork's tensors."""
        table, _, tied = embeddings(program.model)
        vocabulary = {
            "mode": "dynamic",
            "base": len(table),
            "merged": self.batch_merges,
            "rows": -(-(len(table) + self.batch_merges) // MULTIPLE) * MULTIPLE,
            "width": table.shape[1],
            "boundary": self.boundary,
            "least": BATCH_LEAST,
            "prediction": "mean" if network is None else "hypernetwork",
            "inputs": None if network is None else network.enter.in_features,
        }
        kept = network.state_dict() if network is not None else {}
        tensors = {NETWORK + name: value.detach().float().cpu().contiguous() for name, value in kept.items()}
        measured = {
            "mode": "dynamic",
            "boundary": self.boundary,
            "prediction": self.prediction,
            "tied": tied,
            "batch_merges": self.batch_merges,
            "heldout": batch_share(
                calibration, boundary=self.boundary, merges=self.batch_merges, least=BATCH_LEAST, seed=program.seed
            ),
            **trained,
        }
        return PassResult(program.plan.edit(vocabulary=vocabulary), {**program.tensors, **tensors}, measured)

    def _probe(self, program: Program, calibration: Calibration, mined: Mined, rows: Tensor) -> dict[str, Any]:
        length = calibration.longest("heldout", PROBE[1])
        windows = calibration.windows(
            "heldout", length, min(PROBE[0], calibration.available("heldout", length)), seed=program.seed
        )
        return consistency(program.model, mined, rows, windows)

    def _trained(self, program: Program, calibration: Calibration, mined: Mined) -> tuple[Rows, dict[str, Any]]:
        model, seed = program.model, program.seed
        table, head, tied = embeddings(model)
        network = new_hypernetwork(model, seed)
        imitated = imitate(network, model, mined.base, steps=self.imitation_steps, seed=seed, listen=program.listen)
        rows = Rows(network, Pieces(mined.constituents, table, head, tied), len(mined.merges), table.shape[1])
        found: dict[str, Any] = {"imitation": dict(imitated)}
        if self.steps:
            merger, pieces = mined.merger()
            length = min(
                self.context, calibration.longest("train", self.context), calibration.longest("search", self.context)
            )
            windows, held = (
                as_windows(
                    calibration.windows(split, length, min(most, calibration.available(split, length)), seed=seed),
                    merger,
                    pieces,
                )
                for split, most in (("train", self.windows), ("search", 2 * self.batch))
            )
            depth = None if self.depth is None or self.depth >= program.plan.model.layers else self.depth
            # Of what a batch will merge no row is known: there the network has to do alone.
            row_lr = self.row_lr if self.mode == "static" else 0.0
            settings = Settings(self.steps, self.batch, self.lr, row_lr, depth, seed)
            found["distilled"] = distil(model, rows, len(table), windows, held, settings, program.listen) | {
                "context": length,
                "windows": len(windows),
            }
        return rows, found

    def _written(
        self, program: Program, calibration: Calibration, mined: Mined, head: Tensor, vocabulary: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors that writing merged tokens needs, and what text costs in them."""
        model, seed = program.model, program.seed
        length = min(calibration.longest(split, self.context) for split in ("train", "search", "heldout"))
        train, search, held = (
            read_states(
                model,
                head,
                calibration.windows(split, length, min(most, calibration.available(split, length)), seed=seed),
                self.batch,
                program.listen,
            )
            for split, most in zip(
                ("train", "search", "heldout"), (min(self.windows, WRITTEN[0]), *WRITTEN[1:]), strict=True
            )
        )
        merges = torch.tensor([merge[:2] for merge in mined.merges], dtype=torch.int32)
        spelling = Spelling(merges, mined.first)
        settings = OutputSettings(self.write_steps, seed=seed)
        rows, states, found = fit_output(spelling, head, train, search, settings, program.listen)
        tensors = {OUTPUT: rows.contiguous(), STATES_OF: states.contiguous(), MERGES: merges}
        writer = Writer(head, Vocabulary(**vocabulary), tensors, exact=len(rows))
        return tensors, found | written_bits(writer, held)

    @torch.no_grad()
    def _states(self, model: Any, calibration: Calibration, seed: int) -> Tensor:
        """What the output layer gets on train text, [rows, width]."""
        length = calibration.longest("train", STATES[1])
        count = min(STATES[0], calibration.available("train", length))
        tokens = calibration.windows("train", length, count, seed=seed).to(model.device)
        states: Tensor = model.get_decoder()(input_ids=tokens, use_cache=False).last_hidden_state
        return states.flatten(0, 1)
