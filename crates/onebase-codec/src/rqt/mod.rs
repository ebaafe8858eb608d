//! `rqt`: one tree of residual codes for a family of fine-tunes.
//!
//! Sourced (RQT, Findings of ACL 2025, 2025.findings-acl.554, abstract): models are
//! aggregated from the bottom up "based on weight matrix similarity", then quantized from the
//! top down: "each node optimizes the quantization parameters and then delegates residual
//! errors to child nodes", so that similar fine-tunes share low-bit integer weights. The
//! paper's text could not be read. The similarity, the linkage, the choice of bits, the codes
//! and everything else here are this project's own.
//!
//! [`Gram`] measures how much the deltas have in common, [`Tree`] joins those that are alike,
//! [`groups`] says which share codes at all, [`ladder`] and [`share_out`] choose bits for each
//! node at each site, and [`encode_tree`] writes the codes: `Δ_i ≈ Σ diag(γ_i,v) C_v` over the
//! nodes on a model's path, with a gain for each row at shared nodes. The codes of a node are
//! the parts of the codec `rtn`.

mod encode;
mod gram;
mod path;
mod plan;
mod relatives;
mod topology;

pub use encode::{EncodedTree, Fit, SiteNode, encode_tree};
pub use gram::Gram;
pub use path::{Residual, SitePath, fitted_gains, path_energy};
pub use plan::{
    Choice, Costs, FixedLeaf, MAX_LEAF_BITS, MAX_SHARED_BITS, expected_error, ladder, predict,
    share_out,
};
pub use relatives::groups;
pub use topology::{Tree, TreeNode};

use std::fmt;
use std::str::FromStr;

use serde_json::{Map, Value};

use crate::{CodecSpec, Error, Kind, OptionSpec, Options, Result};

/// The name of the codec.
const NAME: &str = "rqt";

/// Which models share codes at a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Topology {
    /// Those of one tree for all sites; each site has bits of its own.
    Family,
    /// Those of a tree of the site's own, within the family's groups.
    Matrix,
    /// None do.
    Flat,
}

/// How a family is stored: `rqt` with its options.
#[derive(Clone, Debug, PartialEq)]
pub struct Rqt {
    options: Options,
}

impl Rqt {
    /// Its name on the command line and on disk.
    pub const NAME: &'static str = NAME;

    /// The version of its choices: how plans are made and codes fitted.
    pub const VERSION: u32 = 1;

    /// One line for people.
    pub const SUMMARY: &'static str =
        "a tree of residual codes that a family of fine-tunes shares, for several at once";

    /// The options it understands.
    pub const OPTIONS: &'static [OptionSpec] = &[
        OptionSpec {
            name: "topology",
            doc: "which models share codes: as one tree for the family has it, one for each \
                  matrix, or none",
            kind: Kind::Choice(&["family", "matrix", "flat"]),
        },
        OptionSpec {
            name: "group_size",
            doc: "consecutive input features that share a scale",
            kind: Kind::Int { min: 16, max: 65536, multiple_of: 16, default: 128 },
        },
        OptionSpec {
            name: "passes",
            doc: "times that all nodes are fitted to each other",
            kind: Kind::Int { min: 0, max: 16, multiple_of: 1, default: 3 },
        },
    ];

    /// With the options given, the others at their defaults.
    ///
    /// # Errors
    /// When one is unknown or has a bad value.
    pub fn new(options: &Map<String, Value>) -> Result<Self> {
        Ok(Self { options: Options::complete(NAME, Self::OPTIONS, options)? })
    }

    /// Its options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// Which models share codes.
    pub fn topology(&self) -> Topology {
        match self.options.choice("topology") {
            "matrix" => Topology::Matrix,
            "flat" => Topology::Flat,
            _ => Topology::Family,
        }
    }

    /// How codes are fitted.
    pub fn fit(&self) -> Fit {
        Fit { group_size: self.options.int("group_size"), passes: self.options.int("passes") }
    }

    /// The codec that reads the codes of a node.
    ///
    /// # Errors
    /// When `bits` are more than [`MAX_LEAF_BITS`], or none.
    pub fn node_codec(&self, bits: usize) -> Result<CodecSpec> {
        let group_size = self.options.int("group_size");
        let options = [("bits", bits), ("group_size", group_size)];
        let options = options.into_iter().map(|(name, value)| (name.to_owned(), value.into()));
        CodecSpec::new("rtn", &options.collect())
    }

    /// Why a delta of a family cannot be multiplied by a number in its parts.
    pub fn not_rescalable() -> Error {
        let known = crate::RESCALABLE.iter().map(|codec| codec.name()).collect();
        Error::NotRescalable { codec: NAME, known }
    }

    /// Whether a text names this codec, whatever its options.
    pub fn is_named(text: &str) -> bool {
        text.split(':').next() == Some(NAME)
    }
}

impl fmt::Display for Rqt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{NAME}:{}", self.options)
    }
}

impl FromStr for Rqt {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (name, rest) = text.split_once(':').unwrap_or((text, ""));
        if name != NAME {
            let got = name.to_owned();
            return Err(Error::UnknownCodec { got, nearest: NAME, known: vec![NAME] });
        }
        Self::new(&Options::read(rest)?)
    }
}
