//! The options of codecs that round with the second moment of inputs.

use crate::numerics::{self, ColumnOrder};
use crate::svd_space::Target;
use crate::{Kind, OptionSpec, Options};

/// Elements that share a range.
pub(crate) const GROUP_SIZE: OptionSpec = OptionSpec {
    name: "group_size",
    doc: "elements of a vector that share a scale and a zero point, with grid=group",
    kind: Kind::Int { min: 16, max: 65536, multiple_of: 16, default: 128 },
};

/// Which columns are rounded first.
pub(crate) const ORDER: OptionSpec = OptionSpec {
    name: "order",
    doc: "which inputs are rounded first: the largest, or as they are",
    kind: Kind::Choice(&["activation", "index"]),
};

/// What `u` is fitted to once `v` has its codes.
pub(crate) const TARGET: OptionSpec = OptionSpec {
    name: "target",
    doc: "what u is fitted to: nothing, the pairs that are kept, or the whole delta",
    kind: Kind::Choice(&["none", "kept", "delta"]),
};

/// What [`TARGET`] says.
pub(crate) fn target(options: &Options) -> Target {
    match options.choice(TARGET.name) {
        "delta" => Target::Delta,
        "kept" => Target::Kept,
        _ => Target::Vectors,
    }
}

/// Of GPTQ.
pub(crate) const DAMPING: OptionSpec = OptionSpec {
    name: "damping",
    doc: "added to the diagonal of second moments, as a part of its mean",
    kind: Kind::Number { min: 0.0, max: 1.0, default: numerics::DAMPING },
};

/// What [`ORDER`] says.
pub(crate) fn order(options: &Options) -> ColumnOrder {
    match options.choice(ORDER.name) {
        "index" => ColumnOrder::Index,
        _ => ColumnOrder::Activation,
    }
}
