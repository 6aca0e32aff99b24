"""One run from configuration to summary: load, split, train round by round, evaluate, save.

What has to survive a kill is in its folder. A resumed run reads the newest checkpoint, cuts the logs back
to it, takes over the replies that had already come in, and ends with the bits of one that was never killed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from torch import nn

from fedtune.config.places import located
from fedtune.config.schema import RunConfig
from fedtune.config.tracking import require_trackers
from fedtune.core.asking import asked
from fedtune.core.cohort import PerRound, QuorumError, RoundOutcome, replies_needed, sample_cohort
from fedtune.core.faults import faults
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.personal import result_models
from fedtune.core.state import from_payload, to_payload
from fedtune.core.store import Store
from fedtune.core.types import Transport
from fedtune.data.objects import ObjectData
from fedtune.errors import FederationError, InputError, ProgramError
from fedtune.federation import checkpoint, rollback
from fedtune.federation.assembly import Assembly, check_counts
from fedtune.federation.callbacks import Callbacks, RoundState
from fedtune.federation.connect import Deployment, check_transport, connected, shared_folder
from fedtune.federation.devices import device_of
from fedtune.federation.files import disk_errors, read_json, write_json
from fedtune.federation.folder import RunFolder, kept, refuse_existing
from fedtune.federation.grids import keep_made
from fedtune.federation.guard import Guard, RoundRefused, last_loss
from fedtune.federation.journal import Journal, written
from fedtune.federation.keeping import Keeping
from fedtune.federation.notes import taken
from fedtune.federation.process import settings_kept, torch_settings
from fedtune.federation.progress import Progress
from fedtune.federation.recorded import examples_of, refuse_replaced
from fedtune.federation.reopening import reopen
from fedtune.federation.round_table import RoundTable
from fedtune.federation.saving import save_models
from fedtune.federation.scored import Evaluated
from fedtune.federation.scoring import Scoring
from fedtune.federation.starting import model_to_train
from fedtune.federation.summary import count_asked, of_rounds, of_run, of_training
from fedtune.federation.tracking import Tracking
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.tuning import count_parameters
from fedtune.protection.account import PrivacyAccount
from fedtune.protection.robust_mean import robust_mean
from fedtune.protection.summing import Summing


def run(
    config: RunConfig,
    path: Path,
    progress: Progress,
    *,
    resume: bool = False,
    deployment: Deployment | None = None,
    objects: ObjectData | None = None,
    callbacks: Callbacks | None = None,
) -> dict[str, Any]:
    """Runs one federation, or continues one, in the folder `path`; returns its summary.

    Args:
        config: The configuration.
        path: The run's folder.
        progress: Is told what happens.
        resume: Continue the run in `path`.
        deployment: The way to real clients, with `transport.name: flower`.
        objects: The examples, with `data.train: objects`.
        callbacks: Are told too.

    Raises:
        InputError: Data, model or folder are not usable. A new run leaves nothing behind then.
        FederationError: A round stayed under its quorum, or the disk is full. The folder holds a
            checkpoint and a summary with `status: stopped`.
        ProgramError: A fault of the program or the machine; as above, once the rounds have begun.
        KeyboardInterrupt: The user stopped it; as above with `status: interrupted`.
    """
    config = located(config)
    check_transport(config, deployment)
    require_trackers(config.tracking)
    back_to, identity = config.checkpoints.rollback, config.sha256()
    if resume:
        folder = reopen(config, path)
        identity = folder.config_sha256()
        rollback.finish(path)  # one that a kill cut short
        if back_to is not None:
            rollback.check(path, back_to, config_sha256=identity)
        elif (done := folder.summary()) and done["status"] == "done":
            refuse_replaced(path, config, objects)
            return done
    else:
        if back_to is not None:
            raise InputError(
                f"checkpoints.rollback={back_to} needs a run to go back in; name its folder with --resume"
            )
        refuse_existing(path)
    clock = Clock()
    progress.stage("loading data and model")
    device = device_of(config.model.device)
    with settings_kept(), torch_settings(config.run, device), shared_folder(config) as shared:
        with clock.part("setup"), faults("loading data and model"):
            assembly = Assembly.assemble(config, clock, objects, path=path, shared=shared)
        assembly.tell(progress)
        if resume:
            assembly.refuse_other_inputs(path)
            assembly.train_as_begun(path)
            if back_to is not None:
                rollback.roll_back(path, back_to)
        told = (callbacks or Callbacks()).behind(RoundTable(path), Tracking(config, path, progress.note))
        federation = _Federation(config, identity, RunFolder(path), assembly, clock, progress, told)
        with faults("preparing the model"):
            federation.prepare()
        assembly.runner.on_step = progress.step
        if deployment is not None:
            progress.stage("waiting for clients")
            assembly.client_examples = deployment.join(
                assembly, read_json(path / "partition.json") if resume else None
            )
            check_counts(config, len(assembly.client_examples))
            assembly.split.partition.update(deployment.partition())
        for note in assembly.note_weights():
            progress.note(note)
        federation.open_account()
        assembly.environment["taken"] = federation.taken()
        if not resume:  # only now: until here, anything in the input may still turn out to be wrong
            split = assembly.split
            RunFolder.create(
                path, config, assembly.environment, split.partition, examples_of(split), split.reading.skipped
            )
        assembly.data.begin()
        try:
            reach = connected(config, assembly, path, clock, deployment, objects, progress.note)
            with reach as transport, faults("the run"):
                summary = federation.run(transport, deployment)
        except KeyboardInterrupt:
            told.end(federation.summarize("interrupted"))
            raise
        except (FederationError, InputError) as error:
            with suppress(FederationError):  # on a full disk; the first error is the one to show
                told.end(federation.summarize("stopped"))
            if isinstance(error, InputError):  # too late for "nothing was written"
                raise ProgramError(f"{error} {kept(path)}") from error
            if isinstance(error, ProgramError):
                error.args = (f"{error} {kept(path)}",)
            raise
        told.end(summary)
        return summary


class _Federation:
    """The rounds of one run."""

    def __init__(
        self,
        config: RunConfig,
        identity: str,
        folder: RunFolder,
        assembly: Assembly,
        clock: Clock,
        progress: Progress,
        callbacks: Callbacks,
    ) -> None:
        self._config, self._folder, self._assembly = config, folder, assembly
        self._clock, self._progress, self._callbacks = clock, progress, callbacks
        assembly.runner.store = Store(folder.path / "held")
        self._ledger = Ledger(
            lambda entry: folder.append("wire.jsonl", entry),
            lambda entry: folder.append("memory.jsonl", entry),
        )
        self._earlier: dict[str, float] = {}  # seconds before a resume
        self._keeping = Keeping(config, identity, folder.path / "checkpoints", assembly.runner)
        self._rounds: list[dict[str, Any]] = []
        self._trainable, self._total_parameters = 0, assembly.base_parameters
        self._model: nn.Module = assembly.loaded.model
        self._start: checkpoint.Checkpoint | None = None
        self._account: PrivacyAccount | None = None
        self._zero_shot = Evaluated()
        self._scoring = Scoring(config, assembly, self._ledger)

    def prepare(self) -> None:
        """Reads the newest checkpoint, scores the untrained model, attaches what is trained; writes nothing.

        Raises:
            InputError: The checkpoint is damaged, or the model does not go with the method or the tasks.
        """
        method, self._start = self._assembly.method, self._keeping.newest()
        self._progress.begin(rounds=method.rounds, name=self._config.method_name)
        if self._start is None:
            self._zero_shot = self._evaluate(None)
            self._keeping.check(self._zero_shot.result)
        self._model = model_to_train(self._config, method, lambda: self._assembly.loaded.model)
        self._total_parameters, self._trainable = count_parameters(self._model)
        self._assembly.runner.use(self._model)

    def taken(self) -> dict[str, str]:
        """What each setting that is `auto` stood for."""
        return taken(self._config, self._assembly.loaded, self._assembly.split, self._model)

    def open_account(self) -> None:
        """Reads what the run has spent of its privacy, once its clients are known; writes nothing.

        Raises:
            InputError: That is not known any more.
        """
        privacy = self._config.federation.privacy
        if privacy is not None:
            self._account = PrivacyAccount(
                privacy,
                self._folder.path,
                per_round=self._config.federation.clients_per_round,
                population=len(self._assembly.client_examples),
                secure=self._config.federation.secure_aggregation is not None,
                done=self._start.round if self._start else 0,
            )

    def run(self, transport: Transport, deployment: Deployment | None = None) -> dict[str, Any]:
        """The rounds that are left, and the result."""
        method, model, start = self._assembly.method, self._model, self._start
        checkpoints = self._folder.path / "checkpoints"
        self._restore(start)
        kind = registry.state_class(self._config.method_name)
        state = from_payload(kind, start.state) if start else method.init(model)
        self._scoring.reach(transport, self._clock, deployment)
        if start is None:  # round 0 is the model before any training
            first = self._evaluate((state, model)) if self._scoring.by_clients else self._zero_shot
            self._record({"round": 0, "clients": [], "train_loss": None}, first, 0.0)
            self._report(None)
        federation = self._config.federation
        robust, secure, privacy = federation.robust, federation.secure_aggregation, federation.privacy
        journal = Journal(transport, checkpoints, self._assembly.runner.states, written(self._config))
        if self._account is not None and self._account.ahead:
            journal.clear()  # its replies must not be summed once more, with other noise
        loop = RoundLoop(
            method,
            journal,
            self._ledger,
            self._clock,
            self._assembly.device,
            server_model=model if method.sends_model else None,
            protection=Summing(cast(Any, method), secure, privacy) if secure or privacy else None,
            robust=robust_mean(robust, cast(Any, method), checkpoints) if robust else None,
            compression=federation.wire.compression(method),
            laid_out=True,
        )
        if deployment is not None:
            deployment.reply_limit = loop.reply_limit
        for round in range(start.round + 1 if start else 1, method.rounds + 1):
            if self._keeping.exhausted(self._rounds):
                break
            try:
                state = self._round(loop, journal, state, model, round)
            except (QuorumError, RoundRefused):
                journal.clear()  # resumed, the round asks everyone again: those left out may be back
                raise
            with self._clock.part("checkpoint"):
                self._save(round, state)
                journal.clear()
            self._report(state)
        best = self._keeping.best(self._rounds)
        state = from_payload(kind, best.state) if best else state
        own = best.clients if best else self._assembly.runner.states
        self._save_result(result_models(method, state, own, model))
        journal.clear()  # where a kill came between the last checkpoint and its own clearing
        count_asked(self._assembly, self._rounds, self._folder.path, self._progress)
        return self.summarize("done")

    def _round(self, loop: RoundLoop, journal: Journal, state: Any, model: nn.Module, round: int) -> Any:
        config, before = self._config, self._clock.total
        cohort = self._account.cohort(self._assembly.client_examples) if self._account else None
        drawn, whom = cohort is not None, self._per_round(round)
        cohort = cohort or sample_cohort(self._assembly.weights, whom, seed=config.seed, round=round)
        self._progress.round(round, len(cohort.clients))
        arrivals: list[dict[str, Any]] = []
        last: tuple[Any, Evaluated] = (None, Evaluated())  # of arrivals: its state may be the round's

        def on_arrival(now: Any, outcome: RoundOutcome) -> None:
            self._progress.client(len(outcome.clients) + len(outcome.left_out))
            self._callbacks.clients(outcome)
            if config.evaluation.arrivals:
                nonlocal last
                last = (now, scores := self._evaluate((now, model)))
                keep_made(scores, self._folder, round, arrivals=len(outcome.clients))
                arrivals.append({"clients": list(outcome.clients), "eval": scores.result})

        sends, least = self._assembly.method.uses_wire, config.federation.quorum
        quorum = replies_needed(len(cohort.clients), least, drawn=drawn, sends=sends)
        privacy: dict[str, Any] = {}
        every, rounds = config.evaluation.every, self._assembly.method.rounds
        due = round == rounds or (every > 0 and round % every == 0)

        def once(without: Mapping[int, str]) -> tuple[Any, RoundOutcome]:
            arrivals.clear()
            if without:
                journal.again(round)
            done = loop.run(state, cohort, round, quorum=quorum, on_arrival=on_arrival, without=without)
            if self._account is not None:  # before anything that was made from the sum is shown or sent
                with disk_errors("privacy.jsonl"):
                    privacy.update(self._account.spend(round, done[1].clients))
            return done

        def scored(now: Any) -> Evaluated:
            found = last[1] if last[0] is now else None
            return (found or self._evaluate((now, model), round)) if due else Evaluated()

        guard = Guard(config.federation, self._assembly.method)
        settled = guard.settle(once, scored, loss=last_loss(self._rounds))
        outcome = settled.outcome
        self._callbacks.clients(outcome)  # those left out after the last arrival
        entry: dict[str, Any] = {
            "round": round,
            "clients": sorted(outcome.clients),
            "left_out": {str(client): reason for client, reason in sorted(outcome.left_out.items())},
            **of_training(outcome, self._assembly.method, settled.state),
        }
        entry |= settled.entry | ({"privacy": privacy} if privacy else {})
        entry |= {"arrivals": arrivals} if arrivals else {}
        self._record(entry, settled.scores, self._clock.total - before)
        return settled.state

    def _evaluate(self, trained: tuple[Any, nn.Module] | None, round: int = 0) -> Evaluated:
        self._progress.stage("evaluating")
        with self._clock.part("evaluation"):
            return self._scoring(trained, round)

    def _record(self, entry: dict[str, Any], scores: Evaluated, seconds: float) -> None:
        entry |= {"eval": scores.result, "seconds": round(seconds, 3), **scores.more}
        if scores.result:
            self._scoring.enter_memory(entry["round"])
        keep_made(scores, self._folder, entry["round"])
        self._rounds.append(entry)
        self._folder.append("rounds.jsonl", entry)
        self._progress.scores(entry["round"], scores.result)

    def _report(self, state: Any) -> None:
        """Tells the callbacks of the round that was recorded last."""
        entry, ledger = self._rounds[-1], self._ledger
        now = RoundState(
            entry, state, dict(ledger.payload_bytes), dict(ledger.framed_bytes), ledger.peak_memory_bytes
        )
        self._callbacks.round(entry["round"], entry["eval"], now)

    def _restore(self, start: checkpoint.Checkpoint | None) -> None:
        self._folder.truncate(dict(start.logs) if start else {})
        if start is None:
            return
        self._rounds = list(self._folder.entries("rounds.jsonl"))
        self._keeping.restore(start, self._rounds)
        self._ledger.restore(self._folder.entries("wire.jsonl"), self._folder.entries("memory.jsonl"))
        self._assembly.runner.states.update(start.clients)
        self._earlier = dict(start.seconds)

    def _save(self, round: int, state: Any) -> None:
        clients, seconds = self._assembly.runner.states, self._clock.by_part(self._earlier)
        whole = checkpoint.Checkpoint(round, to_payload(state), clients, self._folder.sizes(), seconds)
        self._keeping.save(whole, self._rounds)

    def _save_result(self, models: Iterator[tuple[str, nn.Module]]) -> None:
        self._progress.stage("saving the result")
        with self._clock.part("checkpoint"):
            tokenizer, merge = self._assembly.exported_tokenizer, self._assembly.method.saves_merged
            save_models(models, tokenizer, self._folder.path / "final", merge=merge, what="the result")

    def _per_round(self, round: int = 1) -> PerRound:
        """Reference rows always ask everyone: they stand for no communication pattern."""
        often, everyone = self._config.federation.clients_per_round, self._assembly.client_examples
        return asked(self._assembly.method, round, everyone, often)

    def summarize(self, status: str) -> dict[str, Any]:
        """Writes and returns summary.json."""
        summary = {
            **of_rounds(self._rounds),
            **of_run(self._config, self._assembly, self._ledger, self._rounds),
            "trainable_parameters": self._trainable,
            "total_parameters": self._total_parameters,
            "seconds": self._clock.by_part(self._earlier),
            "status": status,
            **self._keeping.document(self._rounds),
        }
        if self._account is not None:
            summary["privacy"] = self._account.spent()
        with disk_errors("summary.json"):
            write_json(self._folder.path / "summary.json", summary)
        return summary
