"""Names that moved to `registry` and to a file per operator; this goes when `fna.export.surgery` uses those."""

from __future__ import annotations

from fna.export.operators.artifact_tokens import ARTIFACT_TOKENS as _ARTIFACT_TOKENS
from fna.export.operators.farthest_point_sampling import FARTHEST_POINT_SAMPLING as _FARTHEST_POINT_SAMPLING
from fna.export.operators.fast_nystrom_attention import FAST_NYSTROM_ATTENTION as _FAST_NYSTROM_ATTENTION
from fna.export.operators.guided_features import GUIDED_FEATURES as _GUIDED_FEATURES
from fna.export.operators.guided_grid import GUIDED_GRID as _GUIDED_GRID
from fna.export.operators.guided_picks import GUIDED_PICKS as _GUIDED_PICKS
from fna.export.operators.landmark_roles import LANDMARK_ROLES as _LANDMARK_ROLES
from fna.export.operators.largest_norm_roles import LARGEST_NORM_ROLES as _LARGEST_NORM_ROLES
from fna.export.operators.masked_attention import MASKED_ATTENTION as _MASKED_ATTENTION
from fna.export.operators.massive_tokens import MASSIVE_TOKENS as _MASSIVE_TOKENS
from fna.export.operators.norm_grid_landmarks import NORM_GRID_LANDMARKS as _NORM_GRID_LANDMARKS
from fna.export.operators.record import DOMAIN as DOMAIN
from fna.export.operators.record import DOMAIN_VERSION, MASKED_DOMAIN_VERSION
from fna.export.operators.registry import attach_functions as attach_functions
from fna.export.operators.registry import plugin_operators

ATTENTION = _FAST_NYSTROM_ATTENTION.name
FARTHEST_POINTS = _FARTHEST_POINT_SAMPLING.name
NORM_GRID = _NORM_GRID_LANDMARKS.name
MASKED_ATTENTION = _MASKED_ATTENTION.name
MASSIVE_TOKENS = _MASSIVE_TOKENS.name
ARTIFACT_TOKENS = _ARTIFACT_TOKENS.name
LANDMARK_ROLES = _LANDMARK_ROLES.name
LARGEST_NORM_ROLES = _LARGEST_NORM_ROLES.name
GUIDED_GRID = _GUIDED_GRID.name
GUIDED_FEATURES = _GUIDED_FEATURES.name
GUIDED_PICKS = _GUIDED_PICKS.name
PLUGIN_FIELDS = _FAST_NYSTROM_ATTENTION.plugin_fields(DOMAIN_VERSION)
MASKED_PLUGIN_FIELDS = _FAST_NYSTROM_ATTENTION.plugin_fields(MASKED_DOMAIN_VERSION)
PLUGIN_OPS = plugin_operators()
