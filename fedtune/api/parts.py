"""Parts of one's own, without a fork: decorators for methods, partitioners, tasks, metrics and templates."""

from __future__ import annotations

from fedtune.data.partition import register_partitioner as register_partitioner
from fedtune.data.templates import register_template as register_template
from fedtune.evaluation.tasks import register_metric as register_metric
from fedtune.evaluation.tasks import register_task as register_task
from fedtune.methods.registry import register_method as register_method
from fedtune.registry import load_plugin as load_plugin
