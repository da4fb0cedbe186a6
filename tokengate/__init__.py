"""tokengate decides which tokens a fine-tuning method may touch.

The public names. What they are made of lives in wings, one folder each: see ARCHITECTURE.md.
"""

from tokengate.adapters.folding import fold as fold
from tokengate.adapters.folding.unloading import merge_and_unload as merge_and_unload
from tokengate.adapters.loading import load as load
from tokengate.adapters.parameter_counts import count as count
from tokengate.adapters.saving import save as save
from tokengate.errors import TokenGateError as TokenGateError
from tokengate.gates.base import Gate as Gate
from tokengate.gates.registry import register_gate as register_gate
from tokengate.gates.threshold import TokenGate as TokenGate
from tokengate.gates.threshold import token_gate as token_gate
from tokengate.layers.coverage import verify as verify
from tokengate.layers.patched import layers as layers
from tokengate.layers.regions import after as after
from tokengate.layers.restriction import restrict as restrict
from tokengate.layers.using import use as use
from tokengate.linears.slices import Slices as Slices
from tokengate.methods.base import Modification as Modification
from tokengate.methods.registry import register as register
from tokengate.patching.disabled import disabled as disabled
from tokengate.patching.patch import patch as patch
from tokengate.patching.patch import unpatch as unpatch
from tokengate.reports.history import History as History
from tokengate.reports.measures.drift import drift as drift
from tokengate.reports.measures.fisher_scores import fisher_scores as fisher_scores
from tokengate.reports.measures.suggestion import suggest as suggest
from tokengate.reports.modification_norms import modification_norms as modification_norms
from tokengate.reports.page.sample_views import PatchView as PatchView
from tokengate.reports.page.sample_views import TokenView as TokenView
from tokengate.reports.recording import record as record
from tokengate.reports.report import SparsityReport as SparsityReport
from tokengate.reports.selection import select as select
from tokengate.training.calibration import calibrate as calibrate
from tokengate.training.clipping import clip_grad_norm_ as clip_grad_norm_
from tokengate.training.following import follow as follow
from tokengate.training.leading.sparsity_schedule import SparsitySchedule as SparsitySchedule
from tokengate.training.orthogonality import orthogonality as orthogonality
from tokengate.training.param_groups import param_groups as param_groups
from tokengate.training.rank_allocator import RankAllocator as RankAllocator
from tokengate.training.scale_penalty import scale_penalty as scale_penalty
from tokengate.training.tau_adam import TauAdam as TauAdam

__version__ = "0.1.0"
