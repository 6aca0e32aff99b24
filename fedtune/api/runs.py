"""What `fedtune.run`, `fedtune.open` and `fedtune.compare` give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.api.federate import federate, shown
from fedtune.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fedtune.config.schema import RunConfig
    from fedtune.data.objects import ObjectData
    from fedtune.federation.callbacks import Callback
    from fedtune.federation.folder import RunFolder
    from fedtune.federation.rows import Rows
    from fedtune.models.load import Loaded


class Run:
    """A federation in its folder: what it was told, what it did, and what it made.

    Attributes:
        path: The folder.
        config: Its configuration.
        objects: The examples, where it was made with some; None: its configuration names them.
    """

    def __init__(self, path: Path, config: RunConfig, objects: ObjectData | None = None) -> None:
        self.path, self.config, self.objects = path, config, objects
        self.folder = path.absolute()  # the same where the program has changed its working folder
        self._loaded: dict[str, Loaded] = {}

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.config.method_name}, {self.status})"

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json: totals, seconds, scores before and after; empty while the run has not ended."""
        return self._files.summary() or {}

    @property
    def status(self) -> str:
        """`done`, `stopped`, `interrupted`, or `unfinished` where nothing wrote a summary."""
        return str(self.summary.get("status", "unfinished"))

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        """`{task: {metric: value}}` of the last round that was evaluated; of the untrained model at first."""
        return next((entry["eval"] for entry in reversed(self.rounds) if entry["eval"]), {})

    @property
    def rounds(self) -> Rows:
        """rounds.jsonl, one dictionary a round; round 0 is the untrained model."""
        return self._rows("rounds.jsonl")

    @property
    def messages(self) -> Rows:
        """wire.jsonl, one dictionary a message: round, client, direction, kind, bytes."""
        return self._rows("wire.jsonl")

    @property
    def clients(self) -> Rows:
        """One dictionary a client: examples, rounds it took part in, bytes, peak memory."""
        from fedtune.federation.files import read_json
        from fedtune.federation.rows import client_rows

        partition = read_json(self.folder / "partition.json")
        return client_rows(partition, self.rounds, self.messages, self._rows("memory.jsonl"))

    def to_pandas(self, what: str = "rounds") -> Any:
        """`rounds`, `messages` or `clients` as a flat table; see `Rows.to_pandas`."""
        if what not in ("rounds", "messages", "clients"):
            raise InputError(f"to_pandas gives rounds, messages or clients; got {what!r}")
        return getattr(self, what).to_pandas()

    def places(self) -> list[str]:
        """Where it was said that its inputs are now, as `fedtune.open` takes it."""
        from fedtune.config.places import places

        return places(self._files.config(), self.config)

    def model(self, name: str = "global") -> PreTrainedModel:
        """The result in memory, in eval mode: a model, or one with its adapter attached.

        Args:
            name: `global`; or what the run made beside it (`adapemu`), or `client-0000` and so on where each
                client has its own; or `zero-shot`, the model that the run began with.

        Raises:
            InputError: The run has no such result (yet).
        """
        return self._result(name).model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that goes with the result."""
        from fedtune.federation.results import tokenizer_of

        return tokenizer_of(self.folder)

    def generate(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        name: str = "global",
    ) -> list[str]:
        """The result's answers, in the template that it was tuned in; of a classifier the class.

        A model that was tuned on plain texts continues a prompt as it is, without any template.

        Args:
            prompts: Instructions; or dictionaries with `instruction` and `input`, or with `messages`, the
                turns of a conversation.
            max_new_tokens: The most tokens of an answer; None: the configuration's, else 64.
            temperature: 0: the likeliest token each time; else drawn.
            top_p: Of draws: the least set of likeliest tokens with this probability in sum.
            seed: Of draws.
            name: Which result, as of `model`.

        Raises:
            InputError: There is no result, or a prompt is empty or too long for the model.
        """
        if self.config.data.pictures is not None:
            raise InputError(f"{self.path} is of a text-to-image model; use draw_to")
        from fedtune.federation.answering import answers
        from fedtune.federation.recorded import trained_on_texts

        return answers(
            self.config,
            self._result(name),
            prompts,
            self._classes,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            texts=trained_on_texts(self.folder, self.config),
        )

    def serve_api(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        key: str | None = None,
        name: str = "global",
        max_tokens: int = 1024,
        quiet: bool = False,
    ) -> None:
        """Answers the OpenAI-compatible routes over HTTP, one request at a time, until Ctrl-C or a signal.

        `/v1/chat/completions` is answered in the template that the model was tuned in, `/v1/completions`
        continues a text as it is; `/v1/models` and `/health`. The model is called as the run's folder is.

        Args:
            host: The address to bind; one that other machines reach needs a key.
            port: Its port; 0: one that is free.
            key: What callers have to say, as `Authorization: Bearer KEY`; None: nothing.
            name: Which result, as of `model`.
            max_tokens: The most of an answer that a request may ask for.
            quiet: No line a request.

        Raises:
            InputError: There is no result, it is no causal language model, or the address cannot be bound.
        """
        from fedtune.deploy.openai_api import serve_run

        if (task := self.config.model.task) != "causal-lm":
            raise InputError(
                f"{self.path} is of task {task}, which the OpenAI-compatible routes have no form for; use "
                f"fedtune generate {self.path}"
            )
        if max_tokens < 1:
            raise InputError(f"max_tokens must be a whole number from 1 up, got {max_tokens!r}")
        made, called = self._result(name), self.folder.name
        serve_run(self.config, made, called, max_tokens, host=host, port=port, key=key, quiet=quiet)

    def draw_to(self, prompt: str, out: str | Path, *, seed: int = 0, name: str = "global") -> Path:
        """Writes a picture of a text-to-image model as PNG, with the run's own steps and guidance.

        Args:
            prompt: What it shows.
            out: The file, which must not be there.
            seed: Of the noise that it begins with.
            name: Which result, as of `model`.

        Raises:
            InputError: There is no result, it makes no pictures, the prompt is empty, or `out` is taken.
        """
        from fedtune.federation.drawing import check_picture_file, drawn, write_picture

        check_picture_file(Path(out))
        return write_picture(drawn(self.config, self._result(name), prompt, seed), Path(out))

    def resume(
        self,
        *,
        rounds: int | None = None,
        callbacks: Sequence[Callback | Any] = (),
        progress: bool = True,
    ) -> Run:
        """Continues the run where it was cut, with the bits of one that never was; a finished one stays.

        Args:
            rounds: How many rounds it is to have in all, more than it had; None: as many as it has. It ends
                with the bits of a run that had so many from the start.
            callbacks: As of `fedtune.run`.
            progress: As of `fedtune.run`.

        Raises:
            InputError: Model or data are not those that it began with, or it cannot have so many rounds.
            FederationError: As `fedtune.run`.
        """
        from fedtune.config.file import parse_config
        from fedtune.federation.claim import claimed

        config = self.config
        if rounds is not None:
            document = config.resolved()
            document["method"]["rounds"] = rounds
            config = parse_config(document, str(self.path))
        with claimed(self.folder, self.folder), shown(progress) as display:
            federate(config, self.folder, self.objects, callbacks, display, resume=True)
        return Run(self.path, config, self.objects)

    def rollback(self, round: int, *, callbacks: Sequence[Callback | Any] = (), progress: bool = True) -> Run:
        """Goes back to a round and trains anew from there; what came after it is moved aside, not lost.

        Raises:
            InputError: The round's checkpoint was not kept; names those that were.
            FederationError: As `fedtune.run`.
        """
        from fedtune.config.file import parse_config
        from fedtune.federation.claim import claimed

        document = self.config.resolved()
        document["checkpoints"]["rollback"] = round
        back = parse_config(document, str(self.path))
        with claimed(self.folder, self.folder), shown(progress) as display:
            federate(back, self.folder, self.objects, callbacks, display, resume=True)
        return Run(self.path, self.config, self.objects)

    def replay(self, round: int, out: str | Path) -> list[Path]:
        """Writes the model of an earlier round, from its checkpoint; returns the folders written.

        Raises:
            InputError: The round's checkpoint was not kept, or `out` is taken.
        """
        from fedtune.federation.results import replay

        return replay(self.folder, self.config, round, Path(out), self.objects)

    def export(
        self, out: str | Path, *, merge: bool = False, format: str | None = None, name: str | None = None
    ) -> list[Path]:
        """Writes the result as a Hugging Face model, PEFT adapter or GGUF file; returns what was written.

        Args:
            out: The folder, which must not hold anything.
            merge: Fold an adapter into the weights and write a whole model.
            format: `peft`, an adapter; `merged`, as `merge`; `gguf`, with the converter of llama.cpp; None:
                as the run made it.
            name: One result alone, as client-0003, a client's own model; None: all there are.

        Raises:
            InputError: There is no result yet or none of that name, it has no such form, `out` is taken, or
                there is no converter.
        """
        from fedtune.federation.formats import GGUF, check_format, require_adapter, write_gguf
        from fedtune.federation.results import export_run

        merge = check_format(format, task=self.config.model.task, merge=merge)
        if format == GGUF:
            return write_gguf(self.path, Path(out), lambda to: self.export(to, merge=True, name=name))
        if format == "peft":
            require_adapter(self.folder)
        return export_run(self.folder, self.config, Path(out), merge=merge, name=name, objects=self.objects)

    def push(self, target: str | Path, *, format: str | None = None, public: bool = False) -> str:
        """Writes the result with a model card into a folder, or puts it into a repository of the hub.

        The card says data split, method, rounds, scores, bytes, privacy spent and versions. Nothing of the
        data is in it, and no place of this machine in any file.

        Args:
            target: A folder that must not hold anything, as "./folder"; or a repository, as "owner/name".
            format: As of `export`; None: an adapter where its base model is on the hub, else a whole model.
            public: Make the repository one that everybody sees, and allow one that is; else it is private.

        Returns:
            The folder, or the address of the commit.

        Raises:
            InputError: The run has not ended, `target` is taken or neither, or the hub refuses.
            FederationError: The hub cannot be reached, or the disk not be written.
        """
        from fedtune.federation.formats import check_format
        from fedtune.federation.publishing import form_for_others, library_of, publish
        from fedtune.federation.results import result_folders
        from fedtune.report.card import card

        check_format(format, task=self.config.model.task)
        first = next(iter(result_folders(self.folder).values()))
        form = form_for_others(first) if format is None else format
        return publish(
            str(target),
            lambda folder: self.export(folder, format=form),
            card(self.folder, self.config, library=library_of(first, form)),
            public=public,
            places=[str(self.folder), str(Path.home()), str(Path.cwd())],
        )

    def report(self, out: str | Path = "report.html") -> Path:
        """Writes one self-contained HTML page of the run; `fedtune.report_page` takes several.

        Raises:
            InputError: `out` is taken, or its folder is not there.
        """
        from fedtune.report.page import write_report

        return write_report([self.folder], Path(out))

    @cached_property
    def _files(self) -> RunFolder:
        from fedtune.federation.folder import RunFolder

        return RunFolder(self.folder)

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        from fedtune.federation.results import classes

        return classes(self.folder, self.config, self.objects)

    def _rows(self, log: str) -> Rows:
        from fedtune.federation.rows import Rows

        return Rows(self._files.entries(log))

    def _result(self, name: str) -> Loaded:
        from fedtune.federation.results import one_result

        if name not in self._loaded:
            self._loaded[name] = one_result(self.folder, self.config, name, self.objects)
        return self._loaded[name]


class Comparison:
    """What `fedtune.compare` found.

    Attributes:
        path: The folder of its runs, with compare.json and table.md.
        document: compare.json: `rows`, one a run, and `table`, means and spreads by configuration.
        metrics: The main metric of each task, as `task.metric`.
    """

    def __init__(self, path: Path, document: Mapping[str, Any], metrics: Sequence[str]) -> None:
        self.path, self.document, self.metrics = path, document, list(metrics)

    def __repr__(self) -> str:
        return f"Comparison({str(self.path)!r}, {len(self.rows)} runs)"

    def __str__(self) -> str:
        """The table as Markdown: mean ± spread over seeds, and the difference from the first row."""
        from fedtune.report.tables import compare_markdown

        return compare_markdown(self.document, self.metrics)

    def _repr_markdown_(self) -> str:
        return str(self)

    @property
    def rows(self) -> Rows:
        """One dictionary a run: `config`, and the fields of its summary.json."""
        from fedtune.federation.rows import Rows

        return Rows(self.document["rows"])

    @property
    def table(self) -> Rows:
        """One dictionary a configuration: means and spreads over the seeds."""
        from fedtune.federation.rows import Rows

        return Rows(self.document["table"])

    def to_pandas(self) -> Any:
        """`table`, flat; see `Rows.to_pandas`."""
        return self.table.to_pandas()
