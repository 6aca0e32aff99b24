"""What a run is assembled from: its method, its data, its model, and the checks that they go together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from fedtune.config.data import CLIENTS
from fedtune.config.peers import refusal as peers_refusal
from fedtune.config.schema import RunConfig
from fedtune.core.client import ClientRunner
from fedtune.core.cohort import quorum_of, sample_cohort, weights_of
from fedtune.core.robust import MeanMethod
from fedtune.core.types import ClientProtection, Method, ServerEnv, SumMethod
from fedtune.data.batching import Batching
from fedtune.data.encoded import Counts, EncodedSet
from fedtune.data.examples import Example
from fedtune.data.objects import ObjectData
from fedtune.data.prompts import prompts, record_of, with_template
from fedtune.errors import InputError
from fedtune.federation.base_model import load_base
from fedtune.federation.class_pictures import beside_class
from fedtune.federation.client_data import ClientData, cache_of
from fedtune.federation.data import Split, prepare_data
from fedtune.federation.devices import device_of
from fedtune.federation.encoding import Keys, encode_for, forms_of, template_of, used_template
from fedtune.federation.evaluator import evaluator_of
from fedtune.federation.files import read_json
from fedtune.federation.notes import of_examples, of_model
from fedtune.federation.plugins import record, require_plugins
from fedtune.federation.process import torch_told
from fedtune.federation.progress import Progress
from fedtune.federation.recorded import loaded_of, refuse_other_classes, refuse_other_data
from fedtune.federation.room import Room, batching_of, example_room, picture_frame
from fedtune.federation.sources import public_examples
from fedtune.federation.starting import adapter_of
from fedtune.measure.clock import Clock
from fedtune.measure.environment import environment
from fedtune.methods import registry
from fedtune.models.compiled import check_compiled
from fedtune.models.heads import drawn_modules, mark_drawn
from fedtune.models.load import Loaded
from fedtune.models.memory_efficient import check_computed_again
from fedtune.models.packable import check_packable
from fedtune.models.portable import name_classes
from fedtune.models.tuning import count_parameters
from fedtune.protection.robust import check_replies
from fedtune.protection.robust_mean import robust_mean
from fedtune.protection.settings import require_packages, threshold_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from fedtune.protection.identity import Identity


@dataclass
class Assembly:
    """What a run is assembled from."""

    config: RunConfig
    split: Split
    loaded: Loaded
    method: Method[Any]
    runner: ClientRunner
    device: torch.device
    client_examples: dict[int, int]
    room: Room  # tokens of an example: data.max_length, as far as the model sees
    batching: Batching
    data: ClientData
    others: dict[str, Counts]  # what became of held-out and public examples
    environment: dict[str, Any]
    base_parameters: int
    shared: Path | None = None  # where the processes of clients find the weights

    @staticmethod
    def assemble(
        config: RunConfig,
        clock: Clock,
        objects: ObjectData | None = None,
        *,
        path: Path | None = None,
        shared: Path | None = None,
    ) -> Assembly:
        """Loads and checks everything; writes nothing. Clients' examples are encoded when they are asked for.

        Args:
            config: The run's configuration.
            clock: Counts the encoding.
            objects: The examples, with `data.train: objects`.
            path: The folder of a run that begins or goes on: what its first round needs is encoded now. None:
                nothing is encoded but public and held-out examples.
            shared: As `load_model` takes it.

        Raises:
            InputError: Data or model are not usable, or the settings do not go with them.
        """
        method = registry.build(config.method, config.seed)
        split = prepare_data(config, pooled=method.pools_data, objects=objects)
        if method.uses_wire and config.data.train != CLIENTS:  # there they are counted when they have joined
            check_counts(config, len(split.clients))
        device = device_of(config.model.device)
        loaded = load_base(config, split.labels, shared=shared)
        if not method.sends_model:  # else it is the server's, and comes to the device while it computes
            torch.nn.Module.to(loaded.model, device)
        check_computed_again(loaded.model, getattr(config.method, "gradient_checkpointing", "none"))
        if getattr(config.method, "compile", False):
            check_compiled(loaded.model)
        if config.data.batching == "packed":
            check_packable(loaded.model)
        name_classes(loaded.model.config, split.labels)
        template = used_template(config, split.examples)
        with clock.part("encoding"):
            room = example_room(config, loaded.model.config)
            batching = batching_of(config, room)
            frame = picture_frame(config, loaded.model)

            def encoded(items: Sequence[Example], whose: str, too_long: str | None = None) -> EncodedSet:
                return encode_for(
                    config,
                    items,
                    loaded.tokenizer,
                    split.labels,
                    max_length=room.tokens,
                    whose=whose,
                    too_long=too_long,
                    frame=frame,
                )

            public = encoded(public_examples(config, split.reading), "the server's public examples")
            if split.reading.skipped:  # of public examples too
                split.partition["skipped"] = split.reading.document()
            # all models are scored on all of them, so they are cut and none is dropped
            held_out = encoded(
                split.evaluation,
                "the held-out examples",
                "error" if config.data.too_long == "error" else "cut",
            )

        def own_examples(client: int, items: Sequence[Example]) -> EncodedSet:
            found = encoded(items, split.owner(client))
            return beside_class(found, config, client, items, loaded, frame=frame, tokens=room.tokens)

        data = ClientData(
            split.clients,
            own_examples,
            Keys(config, loaded.tokenizer, split.labels, room.tokens),
            empty=config.model.task != "classification",
            clock=clock,
        )
        others = {"held_out": held_out.counts}
        if config.data.public is not None:
            others["public"] = public.counts
        method.prepare(ServerEnv(public.items, loaded.tokenizer.pad_token_id, device, batching))
        runner = ClientRunner(
            method,
            loaded.model,
            data,
            pad_id=loaded.tokenizer.pad_token_id,
            seed=config.seed,
            device=device,
            protection=client_protection(config, method),
            batching=batching,
            compression=config.federation.wire.compression(method),
            laid_out=True,
            evaluator=evaluator_of(config, method, loaded.tokenizer, split.labels, split.own),
        )
        about = environment() | {
            "model": {
                "name": config.model.name,
                "weights_sha256": loaded.weights_sha256,
                "drawn": drawn_modules(loaded.model),
                "settings_sha256": dict(loaded.settings_sha256),
                "quantization": loaded.quantization,
                "quantized_sha256": loaded.quantized_sha256,
                **adapter_of(config, loaded.weights_sha256),
            },
            "data": {
                "name": config.data.train,
                "sha256": split.sha256,
                "forms": forms_of(split.examples),
            },
            "device_used": str(device),
            "computing": torch_told(config.run, device),
            **record(config),
            **({"template": record_of(template, loaded.tokenizer)} if template is not None else {}),
        }
        sizes = {client: len(items) for client, items in split.clients.items()}
        base = count_parameters(loaded.model)[0]
        assembly = Assembly(
            config,
            split,
            loaded,
            method,
            runner,
            device,
            sizes,
            room=room,
            batching=batching,
            data=data,
            others=others,
            environment=about,
            base_parameters=base,
            shared=shared,
        )
        if path is not None:
            data.cache = cache_of(config, path)
            assembly.look_ahead()
        return assembly

    @property
    def counts(self) -> dict[str, Counts | None]:
        """What became of training, held-out and public examples, as far as it is known; None: not here."""
        train = [self.data.counts(client) for client in self.data]
        return {"train": sum(train, Counts()) if train else None, **self.others}

    @property
    def notes(self) -> list[str]:
        """What a person should know of the examples and of what is not looked at, a line each."""
        told = of_model(self.config, self.loaded, self.split)
        return [*told, *of_examples(self.config, self.room, self.counts)]

    def tell(self, progress: Progress) -> None:
        """Says what was read, and what a person should know of it."""
        for line in self.split.reading.lines:
            progress.info(line)
        for note in self.notes:
            progress.note(note)

    @property
    def template_told(self) -> str:
        """What clients elsewhere are told as `data.template`: a chat template's text, whatever theirs is."""
        template = template_of(self.config)
        if template is None:
            return self.config.data.template
        how = prompts(template, self.loaded.tokenizer)
        return how.name if how.apart else str(how.text)

    @property
    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer with the template in which the run's examples are, for whoever uses its result."""
        template, tokenizer = used_template(self.config, self.split.examples), self.loaded.tokenizer
        return tokenizer if template is None else with_template(tokenizer, template)

    def look_ahead(self) -> None:
        """Encodes what has to be known before the first round, and what is needed in it.

        That is as many clients as a round asks: those of round 1, unless their draw is secret. Everyone's
        where a length decides: `drop` changes what clients weigh, and with `error` no run begins.

        Raises:
            InputError: Something cannot be encoded, or no example of a client is left.
        """
        asked = self.config.federation.clients_per_round if self.method.uses_wire else None
        # how many examples a plain text becomes depends on its length too
        parted = any(items and items[0].form == "text" for items in self.split.clients.values())
        everyone = asked is None or self.config.data.too_long != "cut" or parted
        first = sample_cohort(self.client_examples, asked, seed=self.config.seed, round=1).clients
        self.look(self.data if everyone else first)

    def look(self, clients: Iterable[int]) -> bool:
        """Encodes what was not yet; says whether more is known than what was to stand in partition.json."""
        before = self.split.partition.get("encoded")
        self.data.look(clients)
        counts = self.counts
        each = {client: self.data.counts(client) for client in self.data}
        self.client_examples |= {client: one.examples for client, one in each.items()}
        if each and not self.method.pools_data:
            for entry, one in zip(self.split.partition["clients"], each.values(), strict=True):
                entry["encoded"] = one.document()
        self.split.partition["encoded"] = {group: one and one.document() for group, one in counts.items()}
        return bool(self.split.partition["encoded"] != before)

    def rows(self, client: int) -> int:
        """Of how many rows a pass over a client's examples is; of examples, where they are not packed."""
        if self.batching.name != "packed":
            return self.client_examples[client]
        return len(self.batching.rows(self.data[client], torch.Generator()))

    @property
    def weights(self) -> dict[int, int]:
        """What each client weighs in a mean: its examples, or what counts of them."""
        federation = self.config.federation
        return weights_of(self.client_examples, federation.weights, federation.max_examples)

    def note_weights(self) -> list[str]:
        """Writes into partition.json what clients weigh, and says who counts as less than it registered."""
        federation, weights, notes = self.config.federation, self.weights, list[str]()
        if not self.method.uses_wire or self.method.pools_data:
            return notes
        for client, entry in enumerate(self.split.partition["clients"]):
            client = int(entry.get("client", client))
            examples, weight = self.client_examples.get(client, 0), weights.get(client, 0)
            if federation.weights == "equal" or weight != examples:
                entry["weight"] = weight
            if federation.weights != "equal" and weight != examples:
                whose = f"client {client} ({entry['name']})" if entry.get("name") else f"client {client}"
                notes.append(f"{whose} registered {examples:,} examples and counts as {weight:,}")
        if federation.weights == "equal":
            notes.append("all clients weigh the same, however many examples they registered")
        return notes

    def refuse_other_inputs(self, path: Path) -> None:
        """Raises InputError if the run in `path` began with other weights, data, plugins or split."""
        require_plugins(path, unchanged=True)
        loaded_of(path, self.loaded)
        began = read_json(path / "environment.json")["model"].get("adapter_sha256")
        if self.environment["model"].get("adapter_sha256") != began:
            raise InputError(f"{path} began with another adapter (model.adapter); bring it back as it was")
        refuse_other_data(path, self.split, self.config.data.train)
        refuse_other_classes(path, self.split.labels)
        now = self.split.partition["clients"]  # none over a network: there the clients say what they have
        if now and _who_has_what(now) != _who_has_what(read_json(path / "partition.json")["clients"]):
            raise InputError(
                f"{path} began with another split than {self.config.data.partition_name} now gives; bring "
                "back what it was made from (a file, a package's version), or start anew with --out"
            )

    def train_as_begun(self, path: Path) -> None:
        """Leaves a pooler frozen where the version that began the run in `path` did."""
        if "drawn" not in read_json(path / "environment.json")["model"]:
            mark_drawn(self.loaded.model, [])


def _who_has_what(clients: list[dict[str, Any]]) -> list[tuple[str, list[int]]]:
    return [(client.get("name", ""), client["indices"]) for client in clients]


def client_protection(
    config: RunConfig, method: Method[Any], identity: Identity | None = None, settings: bytes = b""
) -> ClientProtection | None:
    """A client's half of secure aggregation, where the run has it.

    Args:
        config: The run's configuration.
        method: Its method.
        identity: Over a network: what the client signs with.
        settings: Over a network: digest of the settings as this client was told them.
    """
    secure = config.federation.secure_aggregation
    if secure is None:
        return None
    from fedtune.protection.secure_client import SecureClient  # cryptography only where it is used

    federation = config.federation
    return SecureClient(
        cast(SumMethod[Any], method),
        secure.bits,
        federation.privacy,
        identity,
        secure.threshold,
        settings,
        robust_mean(federation.robust, cast(MeanMethod, method), None) if federation.robust else None,
        lambda examples: weights_of({0: examples}, federation.weights, federation.max_examples)[0],
    )


def check_counts(config: RunConfig, clients: int) -> None:
    """Refuses counts of clients that no round could have."""
    federation = config.federation
    asked = federation.clients_per_round
    if reason := peers_refusal(config.method, asked, clients):
        raise InputError(reason)
    if isinstance(asked, int) and asked > clients:
        raise InputError(f"federation.clients_per_round is {asked}, but there are {clients} clients")
    cohort = sample_cohort(dict.fromkeys(range(clients), 1), asked, seed=config.seed, round=1).clients
    if quorum_of(len(cohort), federation.quorum) > len(cohort):
        raise InputError(
            f"federation.quorum is {federation.quorum}, but a round asks {len(cohort)} clients; "
            "no round could reach it"
        )
    if federation.robust is not None:
        check_replies(federation.robust, quorum_of(len(cohort), federation.quorum))
    require_packages(federation.secure_aggregation, federation.privacy)
    if federation.secure_aggregation is not None:
        threshold_of(federation.secure_aggregation, len(cohort))
        if config.evaluation.where == "clients" and clients > len(cohort):  # all are asked for scores
            threshold_of(federation.secure_aggregation, clients)
    if federation.privacy is not None and federation.privacy.delta * clients >= 1:
        raise InputError(
            f"federation.privacy.delta is {federation.privacy.delta:g}; with {clients} clients it must be "
            f"below {1 / clients:g}: a δ of one in as many clients allows giving one of them away whole"
        )
