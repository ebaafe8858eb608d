use onebase_codec::{CodecSpec, Error as CodecError};
use onebase_compress::TablePlan;

use crate::Result;

/// The codecs that every comparison holds, with the bits of those that are swept
/// over fixed ones.
const BASELINES: [&str; 5] = [
    "rtn:bits=1,group_size=128",
    "rtn:bits=2,group_size=128",
    "rtn:bits=3,group_size=128",
    "rtn:bits=4,group_size=128",
    "sign",
];

/// The baseline that is swept over the sizes asked for.
const SWEPT_BASELINE: &str = "low-rank";

/// What is compared, in which order.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Each with whether it is a baseline.
    pub(crate) codecs: Vec<(CodecSpec, bool)>,
    /// How token tables are stored, if not with the codec itself.
    pub(crate) tables: Option<TablePlan>,
    /// Bits per weight at which a code on the limit line is simulated.
    pub(crate) ideal: Vec<f64>,
    /// Sizes that codecs cannot have.
    left_out: Vec<String>,
}

impl Plan {
    /// The baselines, then the codecs asked for, each written `NAME` or
    /// `NAME:OPTION=VALUE,…`. One that has an option `bits`, and to which no size is
    /// given, is swept over those of `bits` that it accepts; at each of them a code on
    /// the limit line is simulated. `tables` is how embeddings and head are stored,
    /// else with the codec itself.
    ///
    /// # Errors
    /// When a codec or an option is unknown, or one that was asked for can have none of
    /// the sizes.
    pub fn new(codecs: &[String], bits: &[f64], tables: Option<TablePlan>) -> Result<Self> {
        let mut plan =
            Self { codecs: Vec::new(), tables, ideal: bits.to_vec(), left_out: Vec::new() };
        for text in BASELINES {
            plan.add(text, &[], true)?;
        }
        plan.add(SWEPT_BASELINE, bits, true)?;
        for text in codecs {
            plan.add(text, bits, false)?;
        }
        Ok(plan)
    }

    fn add(&mut self, text: &str, bits: &[f64], baseline: bool) -> Result<()> {
        let spec: CodecSpec = text.parse()?;
        let size = spec.bits_option().filter(|_| !CodecSpec::says_size(text));
        let Some(size) = size else {
            self.push(spec, baseline);
            return Ok(());
        };
        let separator = if text.contains(':') { ',' } else { ':' };
        let mut refused = Vec::new();
        let mut n_planned = 0;
        for bits in bits {
            match format!("{text}{separator}{}={bits}", size.name).parse() {
                Ok(spec) => {
                    self.push(spec, baseline);
                    n_planned += 1;
                }
                // A whole number of bits, or a range.
                Err(error @ CodecError::BadOption { .. }) => {
                    refused.push((bits.to_string(), error));
                }
                Err(error) => return Err(error.into()),
            }
        }
        if n_planned > 0 {
            if !refused.is_empty() {
                let sizes: Vec<&str> = refused.iter().map(|(bits, _)| bits.as_str()).collect();
                let sizes = sizes.join(", ");
                self.left_out.push(format!("{text} at {sizes}"));
            }
            return Ok(());
        }
        match refused.into_iter().next() {
            Some((_, error)) if !baseline => Err(error.into()),
            _ => Ok(()),
        }
    }

    fn push(&mut self, spec: CodecSpec, baseline: bool) {
        if !self.codecs.iter().any(|(known, _)| known.to_string() == spec.to_string()) {
            self.codecs.push((spec, baseline));
        }
    }

    /// The same without a code on the limit line, whose models take time and, for each
    /// size, a checkpoint in f32 on disk.
    pub fn without_ideal(mut self) -> Self {
        self.ideal.clear();
        self
    }

    /// What a reader must know of it.
    pub(crate) fn note(&self) -> Option<String> {
        let left_out = self.left_out.join(", no ");
        let note =
            || format!("Not every codec can have every size: no {left_out} bits per weight.");
        (!self.left_out.is_empty()).then(note)
    }

    /// The codecs with their options, in the order in which they are run.
    pub fn codecs(&self) -> impl Iterator<Item = &CodecSpec> {
        self.codecs.iter().map(|(spec, _)| spec)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Error;

    fn planned(codecs: &[&str], bits: &[f64]) -> Vec<String> {
        let codecs: Vec<String> = codecs.iter().map(|c| (*c).to_owned()).collect();
        let plan = Plan::new(&codecs, bits, None).unwrap();
        plan.codecs().map(CodecSpec::to_string).collect()
    }

    #[test]
    fn baselines_are_always_there_and_nothing_twice() {
        let baselines = [
            "rtn:bits=1,group_size=128",
            "rtn:bits=2,group_size=128",
            "rtn:bits=3,group_size=128",
            "rtn:bits=4,group_size=128",
            "sign:scale=row",
            "low-rank:bits=0.5,rank=0,energy=0,svd=full,seed=0",
            "low-rank:bits=2,rank=0,energy=0,svd=full,seed=0",
        ];
        assert_eq!(planned(&[], &[0.5, 2.0]), baselines);
        // Of the sizes, `rtn` can have only 2, which is there.
        assert_eq!(planned(&["rtn", "sign", "low-rank"], &[0.5, 2.0]), baselines);
    }

    #[test]
    fn codecs_are_swept_unless_they_say_their_size() {
        let codecs =
            ["rtn:group_size=64", "rtn:bits=8", "sign:scale=matrix", "dense", "low-rank:rank=3"];
        let more = planned(&codecs, &[0.5, 1.0, 5.0]).split_off(8);
        assert_eq!(
            more,
            [
                "rtn:bits=1,group_size=64",
                "rtn:bits=5,group_size=64",
                "rtn:bits=8,group_size=128",
                "sign:scale=matrix",
                "dense:dtype=f32",
                "low-rank:bits=1,rank=3,energy=0,svd=full,seed=0",
            ]
        );
    }

    #[test]
    fn an_option_whose_name_ends_alike_is_no_size() {
        let more = planned(&["dqrelo-plus:factor_bits=3"], &[1.5, 2.0]).split_off(7);
        let sizes: Vec<&str> = more.iter().map(|c| c.split(',').next().unwrap()).collect();
        assert_eq!(sizes, ["dqrelo-plus:bits=1.5", "dqrelo-plus:bits=2"]);
        assert!(more.iter().all(|codec| codec.contains("factor_bits=3")), "{more:?}");
    }

    #[test]
    fn unknown_codecs_are_refused() {
        let plan = Plan::new(&["rnt".to_owned()], &[1.0], None);
        assert!(matches!(plan, Err(Error::Codec(CodecError::UnknownCodec { .. }))));
    }
}
