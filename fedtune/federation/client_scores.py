"""The server's side of federated evaluation: all clients are asked, and their sums become scores."""

from __future__ import annotations

from typing import Any

from fedtune.config.schema import RunConfig
from fedtune.core.cohort import QuorumError, quorum_of, sample_cohort
from fedtune.core.ledger import Ledger
from fedtune.core.loop import RoundLoop
from fedtune.core.types import Transport
from fedtune.errors import FederationError
from fedtune.federation.assembly import Assembly
from fedtune.federation.connect import Deployment
from fedtune.federation.evaluator import federated
from fedtune.federation.scored import Evaluated
from fedtune.measure.clock import Clock
from fedtune.protection.settings import SecureAggregation
from fedtune.protection.summing import Summing


class ClientScores:
    """Asks the clients of one run for scores.

    Args:
        config: The run's configuration.
        assembly: What it is assembled from, once its clients are known.
        ledger: Gets what is sent, and what memory scoring takes.
        clock: Counts all of it as evaluation.
        transport: The way to the clients. Nothing of it is kept for a resumed run, which asks again.
        deployment: Is told how long a reply may be, where clients are on other machines.
    """

    def __init__(
        self,
        config: RunConfig,
        assembly: Assembly,
        ledger: Ledger,
        clock: Clock,
        transport: Transport,
        deployment: Deployment | None,
    ) -> None:
        self._config, self._assembly, self._clock = config, assembly, clock
        self._deployment, self._evaluation = deployment, federated(config, assembly.method)
        secure = config.federation.secure_aggregation
        masked = SecureAggregation(threshold=secure.threshold) if secure else None
        self._loop = RoundLoop(
            self._evaluation,
            transport,
            ledger,
            clock,
            assembly.device,
            protection=Summing(self._evaluation, masked, None) if masked else None,
            laid_out=True,
            scores=True,
        )

    def __call__(self, state: Any, round: int) -> Evaluated:
        """Scores of a state's result.

        Args:
            state: The server's, of the run's method.
            round: After which it is; 0: before any training.

        Returns:
            Scores over all clients, and over each where the server sees its own; who gave them, and who not.

        Raises:
            FederationError: Fewer clients than the quorum gave a score, or there is nothing to score.
        """
        federation, deployment = self._config.federation, self._deployment
        cohort = sample_cohort(self._assembly.weights, None, seed=self._config.seed, round=round)
        before = deployment.reply_limit if deployment is not None else None
        try:
            if deployment is not None:
                deployment.reply_limit = self._loop.reply_limit
            with self._clock.counted_as("training", "evaluation"):
                done, outcome = self._loop.run(
                    self._evaluation.of(state),
                    cohort,
                    round,
                    quorum=quorum_of(len(cohort.clients), federation.quorum),
                    on_arrival=lambda state, outcome: None,
                )
        except QuorumError as error:
            raise FederationError(f"evaluation by clients after {error}") from None
        finally:
            if deployment is not None and before is not None:
                deployment.reply_limit = before
        scores = self._evaluation.scores(done.sums)
        missing = [task for task in self._evaluation.tasks if task not in scores]
        if missing:
            raise FederationError(
                f"evaluation by clients after round {round}: task {missing[0]} found no token to score in "
                "their held-out examples; look at data.max_length and at the answers in their data"
            )
        left_out = {str(client): why for client, why in sorted(outcome.left_out.items())}
        scored = {"clients": sorted(outcome.clients), "left_out": left_out}
        return Evaluated(scores, per_client=self._evaluation.spread(done), scored=scored)
