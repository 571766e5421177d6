"""One session of a training run: lock the run, read its data, train, and write all its files.

    with Session.open(run_dir, resume=...) as session:     the lock; a new folder, or a run to continue
        training = session.begin(plan, loaded)             data, optimizer, state; the first records
        for stats in training.steps(): ...                 log, checkpoints, at the end adapter/ and memory.json

Both the command `train` and `api.train` use it. `RunDir` writes all files.
"""

import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from qlora_lite.base.identity import files_of_base
from qlora_lite.data.batches import StepSampler, largest_step, sampler_of
from qlora_lite.data.examples import Examples
from qlora_lite.data.repeats import find_repeats
from qlora_lite.errors import DoesNotFit, RunError, TrainingStopped, UserError
from qlora_lite.evaluation import validation_loss
from qlora_lite.evaluation.held_out import account_of
from qlora_lite.files.cache import default_cache
from qlora_lite.files.manifest import sha256_of_file
from qlora_lite.memory.kept import disk_speed
from qlora_lite.model.factors import factors_file
from qlora_lite.plan import Plan
from qlora_lite.recipe import dump_recipe
from qlora_lite.runs.folder import RunDir
from qlora_lite.runs.loading import LoadedModel, held_out_examples, training_examples
from qlora_lite.runs.memory_record import memory_record
from qlora_lite.runs.publish import publish
from qlora_lite.runs.resume import (
    computed_otherwise,
    computed_with,
    data_hashes,
    fixed_sha256,
    go_on_with,
    refuse_other_base,
    refuse_other_data,
    versions,
)
from qlora_lite.training import (
    Preflight,
    StepStats,
    Trace,
    TrainSettings,
    TrainState,
    make_optimizer,
    newest_valid,
    open_trackers,
    refuse_missing_trackers,
    save_checkpoint,
    train_steps,
    try_largest_batch,
)
from qlora_lite.training.seeds import purpose_seed

Say = Callable[[str], None]


@dataclass
class Session:
    """A run locked for this process, from `open` to the end of its block."""

    run: RunDir
    resumes: bool  # from the newest valid checkpoint
    say: Say
    spent: dict[str, float] = field(default_factory=dict)  # seconds outside steps, by phase

    @classmethod
    @contextmanager
    def open(
        cls,
        run_dir: Path | str,
        *,
        resume: bool = False,
        made: Sequence[Path] = (),
        say: Say = lambda text: None,
    ) -> Iterator["Session"]:
        """Open a new run, or with `resume` an existing one. If the block fails before training has begun, a new run's folder and the
        folders `made` are removed again. Raises RunError.
        """
        with RunDir.writing(run_dir) if resume else RunDir.creating(run_dir, made=made) as run:
            yield cls(run, resume, say)

    def begin(self, plan: Plan, loaded: LoadedModel) -> "Training":
        """Read the data, create the optimizer's state, and write the first records, or load the checkpoint.

        Raises RunError if recipe, base or data of a resumed run have changed; DataError; UserError for a tracker that is not installed.
        """
        run, recipe = self.run, plan.recipe
        refuse_missing_trackers(recipe.train.trackers)
        data = data_hashes(recipe)
        if self.resumes:
            for sentence in go_on_with(run, recipe):
                self.say(sentence)
            refuse_other_base(run, loaded.base_sha256, loaded.base)
            refuse_other_data(run, data)
        examples, held_out = self._read_data(plan, loaded)
        sampler = sampler_of(
            examples,
            examples_per_step=recipe.train.examples_per_step,
            epochs=recipe.train.epochs or 1.0,
            max_steps=recipe.train.max_steps,
            seed=recipe.train.seed,
            share_prefixes=plan.share_prefixes,
        )
        optimizer = make_optimizer(
            loaded.model.named_parameters(),
            name=recipe.train.optimizer,
            learning_rate=recipe.train.learning_rate,
            weight_decay=recipe.train.weight_decay,
            loraplus_ratio=recipe.train.loraplus_ratio,
        )
        scaler = torch.amp.GradScaler(plan.device, enabled=plan.types.scale_loss)
        state = TrainState(loaded.model, optimizer, scaler)
        torch.manual_seed(purpose_seed(recipe.train.seed, "dropout"))
        if self.resumes:
            self._load_checkpoint(state, plan)
        else:
            _write_first_records(run, plan, loaded, data)
        planned = plan.chosen.footprint
        state.footprint = planned if state.footprint is None else state.footprint.with_homes_of(planned)
        return Training(self, plan, loaded, state, examples, held_out, sampler)

    @contextmanager
    def clocked(self, phase: str) -> Iterator[None]:
        """Add the block's seconds to `spent[phase]`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.spent[phase] = self.spent.get(phase, 0.0) + time.perf_counter() - begin

    def _read_data(self, plan: Plan, loaded: LoadedModel) -> tuple[Examples, Examples | None]:
        """-> (training examples, held-out examples); reports omitted and repeated rows."""
        data = plan.recipe.data
        examples = training_examples(plan, loaded.tokenizer)
        for sentence in examples.account("training rows", limit="data.num_train"):
            self.say(sentence)
        validates = plan.recipe.train.eval_every_steps is not None
        has_held_out = data.eval is not None and Path(data.eval).exists()
        held_out = held_out_examples(plan, loaded.tokenizer) if has_held_out or validates else None
        if held_out is not None and validates:
            for sentence in account_of(held_out):
                self.say(sentence)
        for sentence in find_repeats(examples, held_out).sentences:
            self.say(f"warning: {sentence}")
        return examples, held_out

    def _load_checkpoint(self, state: TrainState, plan: Plan) -> None:
        checkpoint, problems = newest_valid(self.run.checkpoints, recipe_sha256=fixed_sha256(plan.recipe))
        for problem in problems:
            self.say(problem)
        if checkpoint is None:
            self.say("no checkpoint yet: training starts at step 1")
            self.run.cut_steps(0)
            return
        state.load(checkpoint)
        self.run.cut_steps(state.step)
        self.say(f"continues after step {state.step}, from {checkpoint}")
        for sentence in computed_otherwise(checkpoint, plan.recipe, plan.card):
            self.say(sentence)


@dataclass
class Training:
    """A run with its first records written; `steps` trains it to the end."""

    session: Session
    plan: Plan
    loaded: LoadedModel
    state: TrainState
    examples: Examples
    held_out: Examples | None
    sampler: StepSampler

    @property
    def run(self) -> RunDir:
        return self.session.run

    def steps(self, *, profile: bool = False, should_stop: Callable[[], bool] = lambda: False) -> Iterator[StepStats]:
        """Yield one `StepStats` per optimizer step; write checkpoints, and at the end adapter/ (or weights/).

        When `should_stop()` becomes true, finish the current step, write a checkpoint, and end. A finished run yields no steps. At the
        end the model holds the factors of adapter/: those of the lowest validation loss if the recipe evaluates, else the last. The
        largest micro-batch is tried before the first step; work that runs out of memory, then or later, is repeated with leaner settings.
        With `profile`, write a timeline of two steps into profile/.
        Raises RunError, TrainingStopped, DoesNotFit.
        """
        run, state, say = self.run, self.state, self.session.say
        early_stop = self.plan.recipe.train.early_stop
        with self.session.clocked("trying the largest micro-batch"):
            tried = self._try_largest_batch()
        trace = Trace(run.profile, device=self.plan.device) if profile else None
        try:
            with self._trackers() as track:
                for stats in self._computed(trace):
                    self._log(stats)
                    track(stats)
                    is_last, is_stopped = state.is_over(stats.num_steps, early_stop=early_stop), should_stop()
                    with self.session.clocked("checkpoints"):
                        self._save_if_due(stats, must=is_last or is_stopped)
                    yield stats
                    if is_stopped and not is_last:
                        return
        except TrainingStopped as error:
            if error.state_is_good and state.step > 0:
                self._save()
            raise
        except DoesNotFit as error:
            newest, _ = newest_valid(run.checkpoints)
            kept = (
                "no checkpoint was written yet"
                if newest is None
                else f"the checkpoint {newest.name} is kept; --resume continues from it"
            )
            raise DoesNotFit(f"{error}; {kept}") from error
        if trace is not None:
            say(_trace_in_words(trace))
        if state.step < len(self.sampler):
            say(
                f"stopped early after step {state.step} of {len(self.sampler)}: the validation loss has not fallen for "
                f"{early_stop} evaluations"
            )
        if tried is not None or not run.read_json("memory.json"):  # a session without steps adds nothing
            run.write_json("memory.json", memory_record(self.plan, self.loaded, state, run.read_steps(), tried))
        publish(run, self.plan, self.loaded, state, say)

    def _computed(self, trace: Trace | None) -> Iterator[StepStats]:
        train = self.plan.recipe.train
        return train_steps(
            self.state,
            self.examples,
            self.sampler,
            TrainSettings(
                self.plan.device,
                train.learning_rate,
                train.schedule,
                train.warmup_ratio,
                train.max_grad_norm,
                eval_every_steps=train.eval_every_steps or 1,
                early_stop=train.early_stop,
            ),
            evaluate=None if train.eval_every_steps is None else self._validation_loss,
            leaner=self.plan.leaner,
            trace=trace,
            say=self.session.say,
        )

    def _validation_loss(self) -> float:
        """Return the current loss on the held-out examples, by evaluation's own code."""
        assert self.held_out is not None  # `begin` has read them, or raised
        tokens = (self.state.footprint or self.plan.chosen.footprint).micro_batch_tokens
        return validation_loss(
            self.loaded.model,
            self.held_out,
            device=self.plan.device,
            micro_batch_tokens=tokens,
            share_prefixes=self.plan.share_prefixes,
        )

    def _try_largest_batch(self) -> Preflight | None:
        """Try the largest micro-batch; None if no step is left to train."""
        if self.state.step >= len(self.sampler):
            return None
        return try_largest_batch(
            self.state,
            lambda footprint: largest_step(
                self.examples, self.sampler, footprint.micro_batch_tokens, first=self.state.step
            ),
            device=self.plan.device,
            leaner=self.plan.leaner,
            say=self.session.say,
        )

    def _trackers(self) -> AbstractContextManager[Callable[[StepStats], None]]:
        return open_trackers(
            self.plan.recipe.train.trackers,
            self.run.trackers,
            run_name=self.run.path.resolve().name,
            first_step=self.state.step + 1,
            settings=self.plan.recipe.model_dump(mode="json"),
        )

    def _log(self, stats: StepStats) -> None:
        was_unlogged = self.run.has_unlogged_steps
        unlogged = self.run.append_step(asdict(stats))
        if unlogged is not None and not was_unlogged:
            self.session.say(
                f"step {stats.step}: {unlogged}. Training continues; the line is written as soon as there is space"
            )

    def _save_if_due(self, stats: StepStats, *, must: bool) -> None:
        """Write a checkpoint if it is due. A failure ends training if it `must` be written; otherwise only this checkpoint is lost."""
        is_best = self.state.best is not None and self.state.best.step == stats.step
        if must:
            self._save()
        elif is_best or stats.step % self.plan.recipe.train.save_every_steps == 0:
            try:
                self._save()
            except RunError as error:
                self.session.say(f"{error.what}. Training continues; the next checkpoint is tried when it is due")

    def _save(self) -> None:
        """Sync the log, then write a checkpoint. Raises RunError if either cannot be written."""
        run, plan = self.run, self.plan
        try:
            run.seal_steps()
            save_checkpoint(
                self.state,
                run.checkpoints,
                keep=plan.recipe.train.keep_checkpoints,
                base=self.loaded.base,
                facts=computed_with(plan.recipe, plan.card),
            )
        except (OSError, UserError, SafetensorError) as error:  # save_file raises SafetensorError for a full disk
            reason = error.what if isinstance(error, UserError) else f"{run.checkpoints}: {error}"
            raise RunError(
                f"the checkpoint of step {self.state.step} cannot be written ({reason})",
                advice="Earlier checkpoints are kept: free some space and continue with --resume",
            ) from error


def train(
    plan: Plan,
    loaded: LoadedModel,
    run_dir: Path | str,
    *,
    resume: bool = False,
    profile: bool = False,
    should_stop: Callable[[], bool] = lambda: False,
    say: Say = lambda text: None,
) -> Iterator[StepStats]:
    """Train into `run_dir`: see `Session` and `Training.steps`. Raises RunError, DataError, TrainingStopped, DoesNotFit, UserError."""
    with Session.open(run_dir, resume=resume, say=say) as session:
        yield from session.begin(plan, loaded).steps(profile=profile, should_stop=should_stop)


def _write_first_records(run: RunDir, plan: Plan, loaded: LoadedModel, data: Mapping[str, str]) -> None:
    """Write plan.json, env.json and, last, recipe.yaml, which makes the folder a run."""
    init_from = plan.recipe.lora.init_from
    run.write_json("plan.json", plan.to_json_dict() | disk_speed(default_cache()))
    run.write_json(
        "env.json",
        {
            "base": str(loaded.base),
            "base_sha256": loaded.base_sha256,
            "base_files": files_of_base(loaded.base),
            "init_from": init_from and {"path": init_from, "sha256": sha256_of_file(factors_file(Path(init_from)))},
            "device": plan.recipe.device,
            "card": plan.card.in_words,
            "num_threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "data_sha256": dict(data),
            "versions": versions(),
            "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    )
    run.write_text(run.recipe.name, dump_recipe(plan.recipe))


def _trace_in_words(trace: Trace) -> str:
    if not trace.files:
        return (
            "no timeline was recorded: it needs at least two steps, on the CPU three, because one of them is measured"
        )
    return f"timeline: {', '.join(map(str, trace.files))}; ui.perfetto.dev opens it (nothing is sent anywhere)"
