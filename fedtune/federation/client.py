"""A client's side of a run, built from the run's configuration alone: its data, its model, its runner.

Over a network that is one client, with a file of its own on its own machine. On one machine it is any client
of the run, in one of several processes that each hold the model once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from fedtune.config.file import parse_config
from fedtune.config.pictures import Pictures
from fedtune.config.schema import RunConfig
from fedtune.core.client import ClientRunner
from fedtune.core.faults import LEFT_OUT, faults, whole_traceback
from fedtune.core.seeds import numpy_generator
from fedtune.core.store import Store
from fedtune.core.wire import Content, decode, encode
from fedtune.data.examples import Example
from fedtune.data.holdout import own_part, scored_part
from fedtune.data.objects import ObjectData
from fedtune.data.opening import check_ordinary
from fedtune.data.picture_folders import picture_files
from fedtune.data.pictures import load_pictures
from fedtune.data.reading import NONE_THERE, Reading
from fedtune.data.records import CHOICES
from fedtune.data.sources import count_records, load_examples
from fedtune.errors import FedtuneError, InputError, foreign
from fedtune.evaluation.registry import refuse_unsuited
from fedtune.federation.asked import Asked, settings_digest
from fedtune.federation.assembly import Assembly, client_protection
from fedtune.federation.base_model import load_base
from fedtune.federation.class_pictures import beside_class
from fedtune.federation.client_data import cache_of
from fedtune.federation.consent import Consent
from fedtune.federation.devices import device_of
from fedtune.federation.encoding import describe, encode_for
from fedtune.federation.evaluator import asks_clients, evaluator_of
from fedtune.federation.plugins import load_again
from fedtune.federation.process import listened, set_torch
from fedtune.federation.room import Room, batching_of, example_room, picture_frame
from fedtune.federation.starting import model_to_train
from fedtune.measure.clock import Clock
from fedtune.methods import registry
from fedtune.models.compiled import check_compiled
from fedtune.models.load import Loaded, load_tokenizer
from fedtune.models.memory_efficient import check_computed_again
from fedtune.models.packable import check_packable
from fedtune.transport.acceptance import NotAccepted
from fedtune.transport.messages import Field, Message, broken, fault
from fedtune.transport.worker import JoinedRun
from fedtune.version import __version__

if TYPE_CHECKING:
    from fedtune.protection.identity import Identity


def local_records(data: Path) -> int:
    """How many examples a client's file or folder holds, before any run says which key is what.

    Raises:
        InputError: It is missing, damaged or empty, or of no format that is read.
    """
    _check_here(data)
    count = (len(picture_files(data)) if data.is_dir() else 0) or count_records(data)
    if not count:
        raise InputError(f"{data}: {NONE_THERE}")
    return count


def local_examples(
    data: Path,
    fields: Mapping[str, str | None],
    reading: Reading | None = None,
    pictures: Pictures | None = None,
) -> list[Example]:
    """The examples of a client's own file or folder.

    Args:
        data: Read as `data.train` is.
        fields: Our field names to the file's.
        reading: Is told what was read, and what was skipped if bad rows are.
        pictures: As the run has it: they are read from a folder.

    Raises:
        InputError: It is missing, malformed or empty.
    """
    _check_here(data)
    if pictures is not None:
        account = Reading() if reading is None else reading
        account.what = "--data"
        return load_pictures(str(data.resolve()), "train", pictures.caption, account)
    return load_examples(
        str(data.resolve()), fields=dict(fields), split="train", base=Path("."), reading=reading
    )


def _check_here(data: Path) -> None:
    """Raises InputError if it is not there; nothing is ever asked of the hub in its place."""
    if not data.is_dir():
        check_ordinary(data)


def join(
    invitation: Mapping[str, Field],
    *,
    data: Path,
    fields: Mapping[str, str | None],
    model: str | None,
    device: str,
    consent: Consent,
    identity: Identity | None = None,
) -> JoinedRun:
    """Takes part in the run that the server invited this client to.

    Args:
        invitation: The message's fields: the configuration, the base model's digest.
        data: This client's examples.
        fields: Our field names to the file's; those of the configuration count less.
        model: Where the base model is on this machine; None: where the configuration says.
        device: As `model.device`, of this machine.
        consent: What the operator accepts; is told what the run asks, and holds each order to it.
        identity: What it signs with under secure aggregation.

    Raises:
        NotAccepted: The operator or this version of the program does not take part in such a run.
        InputError: Data or model are not usable here.
    """
    message = Message(invitation)
    try:
        config = parse_config(json.loads(message.text("config")), "the server's configuration")
    except (InputError, ValueError) as error:
        raise NotAccepted(f"fedtune {__version__} there cannot read the configuration: {error}") from None
    method, client = registry.build(config.method, config.seed), message.number("client")
    if identity is not None and identity.number() != client:
        raise NotAccepted(f"the server calls it client {client}, and its clients.json {identity.number()}")
    settings = config.data
    named = {str(ours): theirs for ours, theirs in settings.fields.items()} | dict(fields)
    reading = config.reading
    examples = local_examples(data, named, reading, settings.pictures)
    weights = message.text("weights")
    if reading.choices:
        named.setdefault(CHOICES, CHOICES)
    own: list[Example] = []
    if asks_clients(config, method):
        examples, own = _in_two(config, examples, client, data)
    asked = Asked.of(
        config, method, examples, named, weights=weights, signed=identity is not None, scored=len(own)
    )
    consent.invited(str(invitation.get("run", "")), asked)
    name, where = model or config.model.place, device_of(device)
    set_torch(config.run, where)  # of this process, which knows one run at a time
    labels = tuple(settings.labels or ())
    if config.model.task == "classification":
        unknown = sorted({example.output for example in [*examples, *own]} - set(labels))
        if unknown:
            raise InputError(
                f"{data} has classes that the run does not know: {', '.join(unknown[:5])}; "
                f"it knows {', '.join(labels)}"
            )
    held: nn.Module
    if method.sends_model:  # this client never gets the server's model, and must not need it
        tokenizer, held = load_tokenizer(name, Path(".")), nn.Module()
        room, frame = Room(settings.max_length), None  # as the server has cut it to what its model sees
    else:
        loaded = load_base(config, labels, place=name)
        _refuse_other_base(loaded, message, config.model.name)
        torch.nn.Module.to(loaded.model, where)
        check_computed_again(loaded.model, getattr(config.method, "gradient_checkpointing", "none"))
        if getattr(config.method, "compile", False):
            check_compiled(loaded.model)
        if config.data.batching == "packed":
            check_packable(loaded.model)
        room, frame = example_room(config, loaded.model.config), picture_frame(config, loaded.model)
        tokenizer, held = loaded.tokenizer, method.client_model(lambda: loaded.model)
    found = encode_for(
        config, examples, tokenizer, labels, max_length=room.tokens, whose=str(data), frame=frame
    )
    if not method.sends_model:
        found = beside_class(found, config, client, examples, loaded, frame=frame, tokens=room.tokens)
    agreed = settings_digest(config, weights)
    runner = ClientRunner(
        method,
        held,
        {client: found.items},
        pad_id=tokenizer.pad_token_id,
        seed=config.seed,
        device=where,
        protection=client_protection(config, method, identity, agreed),
        gate=consent,
        batching=batching_of(config, room),
        compression=config.federation.wire.compression(method),
        laid_out=True,  # worker.py sends it in parts
        evaluator=evaluator_of(config, method, tokenizer, labels, {client: own}, identity, agreed),
    )
    notes = [*reading.lines, *reading.notes, *describe({"train": found.counts}, room.tokens)]
    return JoinedRun(runner, len(found.items), config.method_name, tuple(notes))


def _in_two(
    config: RunConfig, examples: list[Example], client: int, data: Path
) -> tuple[list[Example], list[Example]]:
    """A client's examples as it trains on them, and those that it scores itself.

    Raises:
        InputError: None would be left to train on, or they have not what the run's tasks score.
    """
    fraction, seed = config.data.holdout.client_fraction, config.seed
    assert fraction is not None  # evaluation.where: clients needs it
    train, held = own_part(len(examples), fraction, numpy_generator(seed, "holdout", client), str(data))
    most, rng = config.evaluation.max_examples, numpy_generator(seed, "evaluation", client)
    held = scored_part(held, most, rng)
    own = [examples[place] for place in held]
    refuse_unsuited(config.evaluation.tasks, own)
    return [examples[place] for place in train], own


def _refuse_other_base(loaded: Loaded, invitation: Message, name: str) -> None:
    """Refuses a base model that is not the server's, or is not quantised to the same bits."""
    weights, fields = invitation.text("weights"), invitation.fields
    theirs = str(fields.get("quantization", loaded.quantization))  # a server of 0.1 does not say
    if theirs != loaded.quantization:
        raise NotAccepted(
            f"its model {name} is quantised as {loaded.quantization}, and the server's as "
            f"{foreign(theirs, 40)}; all sides need the same checkpoint"
        )
    if loaded.weights_sha256 != weights:
        raise NotAccepted(
            f"its model {name} has other weights ({loaded.weights_sha256[:12]}) than the server's "
            f"({weights[:12]})"
        )
    bits = str(fields.get("quantized", loaded.quantized_sha256))
    if bits != loaded.quantized_sha256:
        raise NotAccepted(
            f"its model {name}, quantised as {loaded.quantization}, has other bits "
            f"({loaded.quantized_sha256[:12]}) than the server's ({foreign(bits[:12], 12)}): another version "
            "of bitsandbytes quantised it; install the server's"
        )


@dataclass(frozen=True)
class OfRun:
    """What a process of this machine is told of the run whose clients it trains.

    Attributes:
        config: The run's configuration, as JSON.
        held: The folder of what clients were sent to hold, which all processes share.
        threads: PyTorch's, of this process.
        base: The folder that relative paths of the configuration start from.
        shared: The folder that the base model's weights are mapped from; empty: each process has its own.
        objects: The examples as JSON, with `data.train: objects`; else empty.
        plugins: Absolute path and sha256 of each plugin file of the run.
    """

    config: str
    held: str
    threads: int
    base: str
    shared: str
    objects: str
    plugins: tuple[tuple[str, str], ...]


def simulated(message: Message, *, of: OfRun) -> Message:
    """The answer of any of a run's clients, in one of several processes of this machine.

    Args:
        message: The order; with it comes what the client keeps between rounds.
        of: The run.

    Returns:
        The reply; or `fault`, where the client is left out; or what `broken` makes, where the run has to end.
    """
    said = list[str]()
    try:
        with faults("a process of the simulation", passing=LEFT_OUT), listened(said):
            runner, client = _runner(of), message.number("client")
            runner.states = {client: decode(message.state).payload} if message.state else {}
            frame = runner.handle(client, message.body)
    except LEFT_OUT as error:
        return fault(str(error))
    except FedtuneError as error:  # it would be the same with every other client
        return broken(str(error), whole_traceback(error))
    state = runner.states.get(client)
    kept = encode(Content(state)) if state is not None else b""
    return Message({"said": json.dumps(said)} if said else {}, frame, kept)


@cache
def _runner(of: OfRun) -> ClientRunner:
    """The runner of all clients, once a process."""
    os.chdir(of.base)  # the process is this simulation's own
    torch.set_num_threads(of.threads)
    load_again(of.plugins)
    objects = ObjectData.from_json(of.objects) if of.objects else None
    config = parse_config(json.loads(of.config), "the run's configuration")
    set_torch(config.run, device_of(config.model.device))
    assembly = Assembly.assemble(config, Clock(), objects, shared=Path(of.shared) if of.shared else None)
    held = Path(of.held)
    assembly.train_as_begun(held.parent)
    assembly.runner.store = Store(held)
    assembly.data.cache = cache_of(assembly.config, held.parent)
    assembly.data.begin()
    if not assembly.method.sends_model:
        assembly.runner.use(model_to_train(config, assembly.method, lambda: assembly.loaded.model))
    return assembly.runner
