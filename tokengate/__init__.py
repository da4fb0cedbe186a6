"""tokengate decides which tokens a fine-tuning method may touch."""

from tokengate.calibration import calibrate as calibrate
from tokengate.coverage import UnreachedLayerWarning as UnreachedLayerWarning
from tokengate.coverage import verify as verify
from tokengate.errors import TokenGateError as TokenGateError
from tokengate.factors import Factors as Factors
from tokengate.folding import Folding as Folding
from tokengate.folding import fold as fold
from tokengate.gate import TokenGate as TokenGate
from tokengate.gate import token_gate as token_gate
from tokengate.gated_linear import GatedLinear as GatedLinear
from tokengate.gated_linear import layers as layers
from tokengate.history import History as History
from tokengate.loading import DifferentBaseWarning as DifferentBaseWarning
from tokengate.loading import load as load
from tokengate.mixing import MixedPositionsWarning as MixedPositionsWarning
from tokengate.modification_norms import ModificationNorms as ModificationNorms
from tokengate.modification_norms import modification_norms as modification_norms
from tokengate.modifications import AdaLoRA as AdaLoRA
from tokengate.modifications import Adapter as Adapter
from tokengate.modifications import DoRA as DoRA
from tokengate.modifications import LoRA as LoRA
from tokengate.modifications import Modification as Modification
from tokengate.modifications import register as register
from tokengate.named_adapters import use as use
from tokengate.orthogonality import orthogonality as orthogonality
from tokengate.param_groups import param_groups as param_groups
from tokengate.patching import disabled as disabled
from tokengate.patching import patch as patch
from tokengate.patching import unpatch as unpatch
from tokengate.rank_allocator import RankAllocator as RankAllocator
from tokengate.recording import record as record
from tokengate.report import SparsityReport as SparsityReport
from tokengate.sample_views import PatchView as PatchView
from tokengate.sample_views import TokenView as TokenView
from tokengate.saving import save as save
from tokengate.scale_penalty import scale_penalty as scale_penalty
from tokengate.selection import select as select
from tokengate.slices import Slices as Slices
from tokengate.sparsity_controller import SparsityController as SparsityController
from tokengate.tau_adam import TauAdam as TauAdam

__version__ = "0.1.0"
