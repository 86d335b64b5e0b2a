"""The whole-sequence forward: control states by an earlier pass, then the pass that is scored.

FACTS section 4 gives the order of things; the names here: B rows, L positions, D width, W width of
what enters the language model (D, but for Qwen3-VL).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from vpt_agent.errors import UserError
from vpt_agent.kernels import Stretch
from vpt_agent.model.deepstack import put, put_at
from vpt_agent.model.masking import MaskRule, hidden_stretches, zeroed_positions
from vpt_agent.model.matching import Place, Plan, make_plan, picture_places
from vpt_agent.model.memory import FeatureMemory, check_keys, encode_once, pictures_of
from vpt_agent.model.onepass import Blocks, Past, begin_run

if TYPE_CHECKING:
    from vpt_agent.model.modeling import VPTForConditionalGeneration


@dataclass(frozen=True)
class Inputs:
    """A batch as ``forward`` gets it; ``looks`` are encoder inputs by kind."""

    ids: Tensor
    mask: Tensor | None
    positions: Tensor | None
    pixel_values: Tensor | None
    grids: Tensor | None
    looks: Mapping[str, Mapping[str, Tensor]]
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    memory: FeatureMemory | None = None


@dataclass(frozen=True)
class Forward:
    """Final-norm hidden states [B, L, D] of the scored pass; see ``VPTOutput`` for the rest."""

    hidden: Tensor
    controls: Tensor | None
    features: Tensor | None


class RunWatcher(Protocol):
    """Is told before each run of the language model in a forward, and when there are no more."""

    def begin(self) -> None:
        """A run begins."""

    def end(self, hidden: Tensor) -> Tensor:
        """The states [B, L, D] that the forward gives; what it is to give in their place."""


def run_forward(
    model: VPTForConditionalGeneration,
    inputs: Inputs,
    *,
    control: str,
    passes: str = "two",
    masking: MaskRule | None = None,
    scored: Tensor | None = None,
) -> Forward:
    """Run all passes for ``inputs``; ``control`` is ``published`` or ``causal``.

    ``passes`` ``one`` computes no position twice (rows padded on the left go the ordinary way),
    ``full`` runs every pass over everything, as the release does: to measure against. ``masking``
    stands in for the config's masks. The loss of ``scored`` labels [B, L] reads the states
    before them, and nobody any other: with ``passes`` ``one`` not all of those are computed.
    """
    output = _run_passes(model, inputs, control, passes, masking, scored)
    if model.runs is None:
        return output
    return replace(output, hidden=model.runs.end(output.hidden))


def _run_passes(
    model: VPTForConditionalGeneration,
    inputs: Inputs,
    control: str,
    passes: str,
    masking: MaskRule | None,
    scored: Tensor | None,
) -> Forward:
    if control not in ("published", "causal"):
        raise UserError("no such control rule", got=control, expected="published or causal")
    if passes not in ("one", "two", "full"):
        raise UserError("no such number of passes", got=passes, expected="one, two or full")
    if inputs.ids.dim() != 2:
        raise UserError(
            "input_ids of the wrong shape", got=tuple(inputs.ids.shape), expected="[B, L]"
        )
    two_pass = model.config.num_inner_forward_run == 2
    frozen = model.config.gradients == "published"
    with torch.no_grad() if frozen else contextlib.nullcontext():
        seen: dict[tuple[str, str], Tensor] = {}
        embeds = _base_embeddings(model, inputs, seen)  # [B, L, D]
        looks = {kind: _look(model, inputs, kind, seen) for kind in inputs.looks}
    features = {
        kind: [model.projector(kind).features(encoded) for encoded in tensors]
        for kind, tensors in looks.items()
    }
    counts = {kind: [len(f) for f in tensors] for kind, tensors in features.items()}
    plan = make_plan(inputs.ids.cpu(), model.table, counts, conditioned=two_pass)
    positions = _positions(model, inputs)
    config = model.config
    rule = masking or MaskRule(config.para_mask_id, config.para_mask_ratio)
    run = _Run(model, inputs, positions, plan, features, rule)
    current = run.place(embeds, plan.places, [features[p.kind][p.picture] for p in plan.places])
    one = passes == "one" and _padded_right(inputs.mask) and not _slides(model)
    if not plan.calls:
        final = torch.cat(run.placed) if run.placed else None
        if one and scored is not None:
            return Forward(run.without_calls(current, scored), None, final)
        if passes == "full" and two_pass:
            run.pass_over(current)
        return Forward(run.pass_over(current), None, final)
    if one:
        return run.in_one_pass(current, control, scored)
    return run.with_controls(current, control, whole=passes == "full")


@dataclass
class _Run:
    """One forward under way. ``states`` [n, D] fill up, in the order of ``_order``."""

    model: VPTForConditionalGeneration
    inputs: Inputs
    positions: Tensor
    plan: Plan
    features: Mapping[str, Sequence[Tensor]]
    rule: MaskRule

    def __post_init__(self) -> None:
        self.placed: list[Tensor] = [self.features[p.kind][p.picture] for p in self.plan.places]

    def pass_over(
        self, embeds: Tensor, hidden: Mapping[int, tuple[int, int]] | None = None
    ) -> Tensor:
        """Hidden states [B, n, D] of the first n positions, ``embeds`` [B, n, W].

        ``hidden``: keys (first, end) by row that its positions from ``end`` on do not see.
        """
        begin_run(self.model)
        n = embeds.shape[1]
        mask = None if self.inputs.mask is None else self.inputs.mask[:, :n]
        if hidden:
            mask = _attention_mask(embeds, mask, hidden)
        return self.model.run_language_model(embeds, self.positions[:, :, :n], mask)

    def place(self, embeds: Tensor, places: Sequence[Place], tensors: Sequence[Tensor]) -> Tensor:
        """``embeds`` with the features ``tensors`` at their ``places``."""
        if not places:
            return embeds
        return put_at(embeds, torch.cat(list(tensors)), _stretches(places))

    def with_controls(self, current: Tensor, control: str, *, whole: bool = False) -> Forward:
        """Fill in control states and conditioned features, mask, and run the scored pass."""
        points = [(c.row, at) for c in self.plan.calls for at in c.controls]  # row by row
        states: dict[tuple[int, int], Tensor] = {}
        for group in _rounds(points, control):
            # Nothing after the last state asked for matters.
            seen = current.shape[1] if whole else max(at for _, at in group)
            hidden = self.pass_over(current[:, :seen])  # [B, seen, D]
            states |= {(row, at): hidden[row, at - 1] for row, at in group}
            current = self._with_states(current, group, states)
            current = self._with_conditioned(current, group, states)
        zeroed, shut = self._masks()
        stacked = torch.stack([states[point] for point in points])  # [n, D]
        final = torch.cat(self.placed) if self.placed else None
        return Forward(self.pass_over(_blanked(current, zeroed), shut), stacked, final)

    def without_calls(self, current: Tensor, scored: Tensor) -> Tensor:
        """Hidden states [B, L, D] of rows without calls, where they are ``scored``."""
        blocks = Blocks(self.model, self.positions, _read(scored, ()))
        blocks.whole(current, dict(enumerate(self._ends())))
        return blocks.hidden(*self.inputs.ids.shape)

    def in_one_pass(self, current: Tensor, control: str, scored: Tensor | None = None) -> Forward:
        """As :meth:`with_controls`, each position computed once where that is the same function."""
        points = [(c.row, at) for c in self.plan.calls for at in c.controls]  # row by row
        by_row: dict[int, list[int]] = {}
        for row, at in points:
            by_row.setdefault(row, []).append(at)
        by_row = {row: sorted(found) for row, found in by_row.items()}
        states: dict[tuple[int, int], Tensor] = {}
        wanted = None if scored is None else _read(scored, points)
        blocks = Blocks(self.model, self.positions, wanted)
        pasts: dict[int, list[Past]] = {row: [] for row in by_row}
        for group in _rounds(points, control):
            stretches = {row: (0, by_row[row][-1]) for row, _ in group}
            if control == "causal":
                stretches = {row: _stretch_before(by_row[row], at) for row, at in group}
            known = pasts[group[0][0]]
            hidden, past = blocks.run(current, stretches, known[-1] if known else None)
            places = {row: i for i, row in enumerate(stretches)}
            for row, at in group:
                states[row, at] = hidden[places[row], at - 1 - stretches[row][0]]
            for row in stretches:
                pasts[row].append(past)
            current = self._with_states(current, group, states)
            current = self._with_conditioned(current, group, states)
        zeroed, shut = self._masks()
        self._finish(blocks, current, by_row, pasts, zeroed, shut)
        stacked = torch.stack([states[point] for point in points])  # [n, D]
        final = torch.cat(self.placed) if self.placed else None
        return Forward(blocks.hidden(*self.inputs.ids.shape), stacked, final)

    def _finish(
        self,
        blocks: Blocks,
        current: Tensor,
        by_row: Mapping[int, Sequence[int]],
        pasts: Mapping[int, Sequence[Past]],
        zeroed: Tensor | None,
        shut: Mapping[int, tuple[int, int]],
    ) -> None:
        """The scored pass: rows go on from their past; plain and blanked rows run whole."""
        ends, rows = self._ends(), len(self.inputs.ids)
        blanked = set() if zeroed is None else set(zeroed.any(1).nonzero().flatten().tolist())
        whole = {r: ends[r] for r in range(rows) if r not in by_row or r in blanked}
        if whole:
            blocks.whole(_blanked(current, zeroed), whole)
        groups: dict[int, tuple[Past, dict[int, tuple[int, int]]]] = {}
        for row, controls in by_row.items():
            if row in blanked:
                continue
            # The past of the last round ends where the row's last control token stands; under an
            # attention mask, and as published, all from the first one on is another function.
            afresh = row in shut or len(pasts[row]) < len(controls)
            past = pasts[row][0 if afresh else -1]
            first = controls[0 if afresh else -1]
            groups.setdefault(id(past), (past, {}))[1][row] = (first, ends[row])
        for past, stretches in groups.values():
            blocks.run(current, stretches, past, shut)

    def _ends(self) -> list[int]:
        """Each row's length without its padding."""
        if self.inputs.mask is None:
            return [self.inputs.ids.shape[1]] * len(self.inputs.ids)
        return [int(n) for n in self.inputs.mask.sum(1).tolist()]

    def _with_states(
        self,
        current: Tensor,
        group: Sequence[tuple[int, int]],
        states: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        index = torch.tensor([row * current.shape[1] + at for row, at in group])
        return put(
            current, torch.stack([states[point] for point in group]), index.to(current.device)
        )

    def _with_conditioned(
        self,
        current: Tensor,
        group: Sequence[tuple[int, int]],
        states: Mapping[tuple[int, int], Tensor],
    ) -> Tensor:
        done = set(group)
        calls = self.plan.calls
        ready = [
            (i, p)
            for i, p in enumerate(self.plan.places)
            if p.call is not None and (calls[p.call].row, calls[p.call].controls[-1]) in done
        ]
        for kind in {p.kind: None for _, p in ready}:
            chosen = [(i, p) for i, p in ready if p.kind == kind]
            controls = torch.stack(
                [
                    torch.stack([states[p.row, at] for at in calls[p.call or 0].controls])
                    for _, p in chosen
                ]
            )  # [M, k, D]
            joined = self.model.condition_many(kind, [self.placed[i] for i, _ in chosen], controls)
            tensors = torch.split(joined, [p.count for _, p in chosen])
            for (i, _), tensor in zip(chosen, tensors, strict=True):
                self.placed[i] = tensor
            current = self.place(current, [p for _, p in chosen], tensors)
        return current

    def _masks(self) -> tuple[Tensor | None, dict[int, tuple[int, int]]]:
        """Positions whose embedding is blanked, and keys that later positions do not see."""
        rule, config = self.rule, self.model.config
        if not self.plan.places:  # as published: only where a picture is re-encoded
            return None, {}
        if rule.how == "attention":
            firsts: dict[int, int] = {}
            for call in self.plan.calls:
                firsts.setdefault(call.row, call.controls[0])
            return None, hidden_stretches(
                self.inputs.ids.cpu(),
                first_controls=firsts,
                rule=rule,
                start_id=config.para_start_id,
                end_id=config.para_end_id,
            )
        zeroed = zeroed_positions(
            self.inputs.ids,
            rows=sorted({c.row for c in self.plan.calls}),
            spared=[(c.row, at) for c in self.plan.calls for at in c.controls],
            mask_id=rule.mask_id,
            ratio=rule.ratio,
            start_id=config.para_start_id,
            end_id=config.para_end_id,
            draw=rule.draw,
        )
        return zeroed, {}


def _read(labels: Tensor, points: Sequence[tuple[int, int]]) -> Tensor:
    """Positions whose states are read, bool [B, L] on the CPU: before a label, before a control."""
    known = labels.cpu() != -100
    read = torch.zeros_like(known)
    read[:, :-1] = known[:, 1:]
    for row, at in points:
        read[row, at - 1] = True
    return read


def _blanked(current: Tensor, zeroed: Tensor | None) -> Tensor:
    return current if zeroed is None else current.masked_fill(zeroed[:, :, None], 0.0)


def _stretch_before(controls: Sequence[int], at: int) -> tuple[int, int]:
    """From the row's control token before ``at`` (or its start) to ``at``."""
    index = controls.index(at)
    return (controls[index - 1] if index else 0), at


def _slides(model: VPTForConditionalGeneration) -> bool:
    """Whether some layers see a window only (no base has such layers as it is published)."""
    return "sliding_attention" in (getattr(model.config.text_config, "layer_types", None) or ())


def _padded_right(mask: Tensor | None) -> bool:
    return mask is None or bool((mask[:, 1:] <= mask[:, :-1]).all())


def _attention_mask(
    embeds: Tensor, mask: Tensor | None, hidden: Mapping[int, tuple[int, int]]
) -> Tensor:
    """Who sees whom: bool [B, 1, n, n]."""
    rows, n = embeds.shape[:2]
    seen = torch.ones(n, n, dtype=torch.bool).tril().repeat(rows, 1, 1)
    for row, (first, end) in hidden.items():
        seen[row, end:, first:end] = False
    if mask is not None:
        # A padded query sees itself, or it would be no number.
        seen &= mask.bool().cpu()[:, None, :] | torch.eye(n, dtype=torch.bool)
    return seen[:, None].to(embeds.device)


def _rounds(points: Sequence[tuple[int, int]], control: str) -> list[list[tuple[int, int]]]:
    """Which control tokens (row, position) get their states in the same pass."""
    if control == "published":
        return [list(points)]
    by_row: dict[int, list[tuple[int, int]]] = {}
    for point in points:
        by_row.setdefault(point[0], []).append(point)
    for row in by_row.values():
        row.sort()
    longest = max(len(row) for row in by_row.values())
    return [[row[i] for row in by_row.values() if i < len(row)] for i in range(longest)]


def _look(
    model: VPTForConditionalGeneration,
    inputs: Inputs,
    kind: str,
    seen: dict[tuple[str, str], Tensor],
) -> Sequence[Tensor]:
    """Tower outputs of a kind's pictures; pictures with the same key are encoded once."""
    values, keys = inputs.looks[kind], inputs.keys.get(kind)
    if keys is None:
        return model.run_tower(kind, **values)
    if model.encoder(kind) is None and set(values) == {"pixel_values", "grid_thw"}:
        return _from_base(model, values["pixel_values"], values["grid_thw"], keys, inputs, seen,
                          kind=kind)  # fmt: skip
    pixels = values["pixels"]
    check_keys(keys, len(pixels), kind=kind)
    return encode_once(
        lambda numbers: model.run_tower(kind, pixels=pixels[numbers]),
        keys,
        seen,
        inputs.memory,
        tower=kind,
    )


def _from_base(
    model: VPTForConditionalGeneration,
    pixel_values: Tensor,
    grids: Tensor,
    keys: Sequence[str],
    inputs: Inputs,
    seen: dict[tuple[str, str], Tensor],
    *,
    kind: str,
) -> Sequence[Tensor]:
    """Tokens of the base tower: a picture that is looked at again is not encoded again."""
    check_keys(keys, len(grids), kind=kind)
    return encode_once(
        lambda numbers: model.encode_images(*pictures_of(numbers, pixel_values, grids)),
        keys,
        seen,
        inputs.memory,
        tower="image",
    )


def _base_embeddings(
    model: VPTForConditionalGeneration, inputs: Inputs, seen: dict[tuple[str, str], Tensor]
) -> Tensor:
    """Token embeddings [B, L, W] with the base tower's pictures in place."""
    embeds: Tensor = model.get_input_embeddings()(inputs.ids)
    pictures: Sequence[Tensor] = ()
    if (inputs.pixel_values is None) != (inputs.grids is None):
        raise UserError("pixel_values and image_grid_thw go together", where="forward")
    if inputs.pixel_values is not None and inputs.grids is not None:
        keys = inputs.keys.get("image")
        if keys is None:
            pictures = model.encode_images(inputs.pixel_values, inputs.grids)
        else:
            pictures = _from_base(
                model, inputs.pixel_values, inputs.grids, keys, inputs, seen, kind="image"
            )
    places = picture_places(
        inputs.ids.cpu(), model.config.image_token_id, [len(p) for p in pictures], kind="image"
    )
    if not places:
        return embeds
    return put_at(embeds, torch.cat(list(pictures)), _stretches(places))


def _stretches(places: Sequence[Place]) -> list[Stretch]:
    """Where the features of ``places`` stand, one picture after the other."""
    ends = itertools.accumulate(p.count for p in places)
    return [
        Stretch(p.row, p.first, p.count, end - p.count) for p, end in zip(places, ends, strict=True)
    ]


def _positions(model: VPTForConditionalGeneration, inputs: Inputs) -> Tensor:
    """Position ids [3, B, L]: those given, or by ``config.positions``."""
    rows, length = inputs.ids.shape
    device = inputs.ids.device
    given = inputs.positions
    if given is not None:
        if tuple(given.shape) == (rows, length):
            return given.expand(3, rows, length)
        if tuple(given.shape) != (3, rows, length):
            raise UserError(
                "position_ids of the wrong shape",
                got=tuple(given.shape),
                expected=f"(3, {rows}, {length}) or ({rows}, {length})",
            )
        return given
    if model.config.positions == "published":
        return torch.arange(length, device=device).expand(3, rows, length)
    positions = torch.zeros(3, rows, length, dtype=torch.int64)
    ids = inputs.ids.cpu()
    grids = [] if inputs.grids is None else inputs.grids.tolist()
    for row in range(rows):
        kept = slice(None) if inputs.mask is None else inputs.mask[row].bool().cpu()
        sequence = ids[row][kept]
        pads = (sequence == model.config.image_token_id).to(torch.int8)
        count = int((torch.diff(pads, prepend=pads.new_zeros(1)) == 1).sum())
        positions[:, row, kept] = model.rope_positions(sequence, grids[:count])
        grids = grids[count:]
    return positions.to(device)
