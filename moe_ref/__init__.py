"""moe_ref: the reference. It says what a Mixture-of-Experts layer computes, in NumPy and float64."""

from moe_ref.agreement import RoutingAgreement, agreement
from moe_ref.align import AlignedRows, align_rows, pad_rows, unpad_rows
from moe_ref.backward.balance import balance_layers_backward, balance_loss_backward, capacity_backward, z_loss_backward
from moe_ref.backward.layer import LayerGradients, layer_backward
from moe_ref.backward.sharded import ShardedGradients, sharded_backward
from moe_ref.balance import (
    BalanceTrace,
    LoadStatistics,
    balance,
    balance_layers,
    balance_loss,
    bias_step,
    bias_update,
    load_statistics,
    tokens_per_expert,
    z_loss,
)
from moe_ref.capacity import CapacityTrace, apply_capacity
from moe_ref.dispatch import plan, plan_chunks
from moe_ref.experts import combine, run_experts
from moe_ref.invariant import layer_of_each
from moe_ref.layer import LayerTrace, moe_layer
from moe_ref.permute import Permutation, permute, unpermute
from moe_ref.quantile import quantile_update
from moe_ref.replay import capture, replay, replay_layer
from moe_ref.replicas import home, home_gradients, place_slots, replicate
from moe_ref.routing import RoutingTrace, gate, route
from moe_ref.sharded import ShardedTrace, sharded_layer
from moe_ref.sparsity import next_coefficient
from moe_ref.specs.align import AlignSpec
from moe_ref.specs.balance import BALANCE_FORMS, SMEBU, BalanceSpec, BiasUpdateSpec, CapacitySpec
from moe_ref.specs.ids import UNUSED
from moe_ref.specs.inputs import NO_INPUTS, RouterInputs
from moe_ref.specs.layer import ExpertSpec, LatentSpec, LayerSpec, SharedSpec
from moe_ref.specs.layout import ShardLayout
from moe_ref.specs.params import LayerParams, WeightLayout
from moe_ref.specs.quantile import QUANTILE_FORMS, QuantileSpec
from moe_ref.specs.readers.hf_weights import params_from_hf, params_to_hf
from moe_ref.specs.record import RoutingRecord, load_records, save_records
from moe_ref.specs.replicas import ReplicaSpec
from moe_ref.specs.router import RouterSpec
from moe_ref.specs.served import records_from_served, served_array, served_base64, served_from_records
from moe_ref.specs.sparsity import SparsitySpec
from moe_ref.specs.training import Event, StackSpec
from moe_ref.strategies import STRATEGIES
from moe_ref.strategies.base import RankPlan
from moe_ref.training import TrainingState, train

__all__ = [
    "BALANCE_FORMS",
    "NO_INPUTS",
    "QUANTILE_FORMS",
    "SMEBU",
    "STRATEGIES",
    "UNUSED",
    "AlignSpec",
    "AlignedRows",
    "BalanceSpec",
    "BalanceTrace",
    "BiasUpdateSpec",
    "CapacitySpec",
    "CapacityTrace",
    "Event",
    "ExpertSpec",
    "LatentSpec",
    "LayerGradients",
    "LayerParams",
    "LayerSpec",
    "LayerTrace",
    "LoadStatistics",
    "Permutation",
    "QuantileSpec",
    "RankPlan",
    "ReplicaSpec",
    "RouterInputs",
    "RouterSpec",
    "RoutingAgreement",
    "RoutingRecord",
    "RoutingTrace",
    "ShardLayout",
    "ShardedGradients",
    "ShardedTrace",
    "SharedSpec",
    "SparsitySpec",
    "StackSpec",
    "TrainingState",
    "WeightLayout",
    "agreement",
    "align_rows",
    "apply_capacity",
    "balance",
    "balance_layers",
    "balance_layers_backward",
    "balance_loss",
    "balance_loss_backward",
    "bias_step",
    "bias_update",
    "capacity_backward",
    "capture",
    "combine",
    "gate",
    "home",
    "home_gradients",
    "layer_backward",
    "layer_of_each",
    "load_records",
    "load_statistics",
    "moe_layer",
    "next_coefficient",
    "pad_rows",
    "params_from_hf",
    "params_to_hf",
    "permute",
    "place_slots",
    "plan",
    "plan_chunks",
    "quantile_update",
    "records_from_served",
    "replay",
    "replay_layer",
    "replicate",
    "route",
    "run_experts",
    "save_records",
    "served_array",
    "served_base64",
    "served_from_records",
    "sharded_backward",
    "sharded_layer",
    "tokens_per_expert",
    "train",
    "unpad_rows",
    "unpermute",
    "z_loss",
    "z_loss_backward",
]
