"""transformers' Trainer with our batches, our loss and checkpoints that can be taken up again."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState

from vpt_agent.errors import TrainingError, UserError
from vpt_agent.model.masking import MaskRule
from vpt_agent.model.memory import FeatureMemory
from vpt_agent.training.collate import Batch
from vpt_agent.training.folder import prune
from vpt_agent.training.logs import MetricsFile, write_whole
from vpt_agent.training.metrics import ClassAccuracy
from vpt_agent.training.sharded import EqualRuns, shard_layers
from vpt_agent.training.stream import Batches, Cursor, Fixed

STATE = "data_state-{rank}.json"
"""Beside a checkpoint's weights: where the rows of a process stood. Written last."""


def is_whole(checkpoint: Path) -> bool:
    """Whether all processes have written what they write last."""
    try:
        state = json.loads((checkpoint / STATE.format(rank=0)).read_text(encoding="utf-8"))
    except OSError:
        return False
    ranks = range(int(state["world"]))
    return all((checkpoint / STATE.format(rank=rank)).is_file() for rank in ranks)


class Totals(NamedTuple):
    """Counts of rows (what became of them), of tokens, and of rows by the kind that they teach."""

    rows: Counter[str]
    tokens: Counter[str]
    kinds: Counter[str]

    @property
    def padding(self) -> float:
        """The share of padding in the tokens trained on."""
        return self.tokens["padding"] / max(1, self.tokens["all"])


class VPTTrainer(Trainer):
    """Trains ``VPTForConditionalGeneration`` on :class:`~vpt_agent.training.stream.Batches`.

    ``rule`` are the masks in training, ``evaluation_rule`` in evaluation; ``passes`` as in the
    model's ``forward``. Losses of single steps (the mean of all processes) go to ``metrics.jsonl``
    unrounded. The newest ``keep`` checkpoints stay.
    """

    control: Any

    def __init__(
        self,
        *,
        model: nn.Module,
        args: TrainingArguments,
        batches: Batches,
        evaluation: Fixed | None,
        rule: MaskRule,
        evaluation_rule: MaskRule,
        passes: str,
        classes: list[int],
        say: Callable[[str], None],
        memory: FeatureMemory | None = None,
        prefetch: int = 2,
        keep: int | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        shard_layers(model)  # before accelerate reads it
        super().__init__(
            model=model,
            args=args,
            train_dataset=batches,
            eval_dataset=evaluation,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.batches, self.evaluation = batches, evaluation
        self.rule, self.evaluation_rule, self.passes = rule, evaluation_rule, passes
        self.classes, self.prefetch = classes, prefetch
        self.memory, self.keep = memory, keep
        if evaluation is not None and self.sharded:
            # Each forward needs all processes: each of them evaluates all rows.
            evaluation.rank, evaluation.world = 0, 1
        self.metrics = MetricsFile(Path(args.output_dir))
        self.cursors: dict[int, Cursor] = dict(batches.cursors)
        self.given = batches.given
        self.rows: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self._losses: list[float] = []
        self._rate = 0.0
        if self.is_fsdp_enabled:
            cast(Any, model).runs = EqualRuns(model)
        else:
            model.register_forward_hook(_reach_parameters)
        self.remove_callback(PrinterCallback)  # standard output is for results
        self.add_callback(_Steps(self, say))

    @property
    def sharded(self) -> bool:
        """Whether a process holds a part of the weights only (or may: with DeepSpeed)."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # --- data ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Batch]:
        """Ready batches of this process. Not accelerate's: it would deal them out a second time."""
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.batches,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=self.prefetch if workers else None,
            generator=self._apart(),
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
        )

    def _apart(self) -> torch.Generator:
        """A loader draws a seed when it begins; from torch's own generator, that would move the
        draws of a run that is taken up."""
        return torch.Generator().manual_seed(self.args.seed)

    def _arguments(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What of a batch goes to the model."""
        ours = ("rows", "cursor", "counts", "kinds")
        return {name: value for name, value in inputs.items() if name not in ours}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch on the device; what a worker found wrong is raised here."""
        if "error" in inputs:
            raise inputs["error"]
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        return prepared

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **_: Any,
    ) -> Any:
        """The mean over the batch's labels. A loss that is no number is a TrainingError."""
        output = model(
            **self._arguments(inputs),
            passes=self.passes,
            labelled_only=True,
            memory=self.memory,
            masking=self.rule if model.training else self.evaluation_rule,
        )
        value = float(output.loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                "the loss is no number any more",
                where=f"step {self.state.global_step + 1}, {'; '.join(inputs['rows'])}",
                got=value,
                fix="lower optim.learning_rate, raise optim.warmup, or look at these rows",
            )
        if model.training:
            self._count(inputs, value)
        return (output.loss, output) if return_outputs else output.loss

    def _count(self, inputs: Mapping[str, Any], loss: float) -> None:
        self._losses.append(loss)
        mask = inputs["attention_mask"]
        self.tokens["all"] += mask.numel()
        self.tokens["padding"] += mask.numel() - int(mask.sum())
        self.rows.update(inputs["counts"])
        self.kinds.update(inputs["kinds"])
        worker, window, used = inputs["cursor"]
        self.cursors[int(worker)] = Cursor(int(worker), int(window), int(used))
        self.given += 1

    def totals(self) -> Totals:
        """What all processes together have trained on so far; all of them must ask."""
        own = Totals(Counter(self.rows), Counter(self.tokens), Counter(self.kinds))
        if self.args.world_size == 1:
            return own
        every: list[Any] = [None] * self.args.world_size
        torch.distributed.all_gather_object(every, own)
        return Totals(*(sum(counts, Counter()) for counts in zip(*every, strict=True)))

    def begin_step(self) -> None:
        """Note the learning rate that the optimiser is about to step with."""
        self._rate = float(self._get_learning_rate())

    def end_step(self) -> None:
        """Write the losses of the step that ended."""
        if self._losses:
            mean = sum(self._losses) / len(self._losses)
            if self.args.world_size > 1:
                value = torch.tensor(mean, dtype=torch.float64, device=self.args.device)
                mean = float(self.accelerator.reduce(value, "mean"))
            if self.is_world_process_zero():
                row = {"step": self.state.global_step, "loss": mean, "rate": self._rate}
                self.metrics.write(row)
        self._losses = []

    # --- evaluation ---------------------------------------------------------------------------

    def evaluate(self, *_: Any, metric_key_prefix: str = "eval", **__: Any) -> dict[str, float]:
        """Loss (mean over all labels) and accuracy, overall and by class, on the kept rows."""
        if self.evaluation is None:
            raise UserError("there are no rows to evaluate on", fix="set data.hold_out")
        # Processes have unequal numbers of batches: only sharded weights need the wrapped model.
        model = self.model_wrapped if self.sharded else self.model
        was = model.training
        model.eval()
        accuracy = ClassAccuracy(self.classes)
        total = labels = 0.0
        loader = DataLoader(
            self.evaluation,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            generator=self._apart(),
        )
        for batch in loader:
            inputs = self._prepare_inputs(batch)
            with torch.no_grad(), self.compute_loss_context_manager():
                loss, output = self.compute_loss(model, inputs, return_outputs=True)
            target = inputs["labels"][:, 1:]
            target = target[target != -100]
            total += float(loss) * len(target)
            labels += len(target)
            # Not shifted: as if each label stood behind its prediction.
            rows = np.full((2, len(target) + 1), -100)
            rows[0, :-1], rows[1, 1:] = output.logits.argmax(-1).cpu(), target.cpu()
            accuracy.update(rows[:1], rows[1:])
        model.train(was)
        figures = self._gathered(accuracy, total, labels)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if self.is_world_process_zero():
            self.metrics.write({"step": self.state.global_step, **metrics})
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _gathered(self, accuracy: ClassAccuracy, total: float, labels: float) -> dict[str, float]:
        """The figures of all processes together."""
        sums = torch.tensor([total, labels, *accuracy.counts()], dtype=torch.float64)
        if self.args.world_size > 1 and not self.sharded:
            sums = self.accelerator.reduce(sums.to(self.args.device), "sum").cpu()
        merged = ClassAccuracy.of_counts(self.classes, [int(n) for n in sums[2:].tolist()])
        return {"loss": float(sums[0] / sums[1].clamp(min=1)), **merged.result()}

    # --- checkpoints --------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """As transformers, but by the names that the model has in memory.

        Its own layout renames some tensors, and taking the run up again would lose those.
        """
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        model: Any = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict=state_dict, save_original_format=False)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, Path(folder) / "training_args.bin")

    def data_state(self) -> dict[str, Any]:
        """Where the rows of this process stand."""
        return {
            "given": self.given,
            "world": self.args.world_size,
            "workers": self.args.dataloader_num_workers,
            "cursors": [list(cursor) for cursor in self.cursors.values()],
            "rows": dict(self.rows),
            "tokens": dict(self.tokens),
            "kinds": dict(self.kinds),
            "mixture": self.batches.rows.state_dict(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take the counts of an earlier part of the run up; a :class:`UserError` where the rows
        have changed since."""
        self.batches.rows.load_state_dict(state.get("mixture", {}))
        self.rows.update(state["rows"])
        self.tokens.update(state["tokens"])
        self.kinds.update(state.get("kinds", {}))

    def take_up(self, checkpoint: Path) -> None:
        """Stand where ``checkpoint`` was written, whose steps were all that the run has."""
        if self.sharded:
            raise UserError(
                "all steps of this run are done, and sharded weights are taken up to train only",
                where=checkpoint,
                fix="take it up without fsdp and deepspeed",
            )
        self._load_from_checkpoint(str(checkpoint))
        self._load_rng_state(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def full_state(self) -> dict[str, Any] | None:
        """All weights, where each process holds a part of them; else None. All must ask."""
        if not self.sharded:
            return None
        state: dict[str, Any] = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def save_data_state(self, folder: Path) -> None:
        """Write the data's state beside a checkpoint: with those of all processes it is whole.

        Older checkpoints go then, and not before.
        """
        write_whole(folder / STATE.format(rank=self.args.process_index),
                    json.dumps(self.data_state()))  # fmt: skip
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            prune(folder.parent, is_whole, keep=self.keep, spare=[Path(best)] if best else [])


def _reach_parameters(model: nn.Module, _: Any, output: Any) -> None:
    """A forward hook: where no row of a batch reaches what is trained (a projector, and rows
    without its action), the step has gradients of zero, as it has among other rows.

    Inside the model's call, so that DistributedDataParallel sees that its parameters are used.
    """
    if model.training and output.loss is not None and not output.loss.requires_grad:
        learning = (p for p in model.parameters() if p.requires_grad)
        output.loss = output.loss + sum(p.sum() * 0 for p in learning)


class _Steps(TrainerCallback):
    """Calls the trainer back where transformers lets callbacks only."""

    def __init__(self, trainer: VPTTrainer, say: Callable[[str], None]) -> None:
        self.trainer, self.say = trainer, say

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Say the figures that a person follows."""
        wanted = ("loss", "learning_rate", "grad_norm", "eval_loss", "eval_accuracy")
        told = [f"{name} {float(logs[name]):.4g}" for name in wanted if name in (logs or {})]
        if told and state.is_world_process_zero:
            self.say(f"step {state.global_step}: {', '.join(told)}")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The gradients of a step are complete."""
        self.trainer.begin_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The losses of a step are complete."""
        self.trainer.end_step()

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint has been written but for the data's state."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            self.trainer.save_data_state(folder)
