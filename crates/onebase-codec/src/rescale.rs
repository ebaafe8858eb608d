use onebase_tensor::{EncodedDelta, Part, PartData, saturating_bf16};

use crate::{Codec, CodecSpec, Error, RESCALABLE, Result};

/// A codec whose delta can be multiplied by a number in its parts, nothing else in them
/// changing: what a fit of scales after encoding needs.
pub trait Rescale: Codec {
    /// The parts, F32 or BF16, in which the delta is linear, the others held: times a
    /// number, all those that are there, they decode to the delta times that number.
    fn linear_parts(&self) -> &'static [&'static str];
}

impl CodecSpec {
    /// The codec as one whose deltas can be rescaled.
    ///
    /// # Errors
    /// When it is not; the error names those that are.
    pub fn rescalable(&self) -> Result<&'static dyn Rescale> {
        let name = self.codec().name();
        RESCALABLE.iter().copied().find(|codec| codec.name() == name).ok_or_else(|| {
            Error::NotRescalable {
                codec: name,
                known: RESCALABLE.iter().map(|codec| codec.name()).collect(),
            }
        })
    }

    /// Multiplies a delta by a finite number: in its parts, which round the products to
    /// their own types, the largest number of a type in place of ∞.
    ///
    /// # Errors
    /// When the codec cannot.
    pub fn rescale(&self, delta: &mut EncodedDelta, factor: f32) -> Result<()> {
        for name in self.rescalable()?.linear_parts() {
            let Some(part) = delta.parts.get_mut(*name) else { continue };
            let data = match part.data() {
                PartData::F32(values) => {
                    PartData::F32(values.iter().map(|v| bounded(v * factor)).collect())
                }
                PartData::BF16(values) => PartData::BF16(
                    values.iter().map(|v| saturating_bf16(v.to_f32() * factor)).collect(),
                ),
                // Parts are checked when they are prepared.
                PartData::U8(_) | PartData::F16(_) => continue,
            };
            if let Some(scaled) = Part::new(part.shape().to_vec(), data) {
                *part = scaled;
            }
        }
        Ok(())
    }
}

fn bounded(value: f32) -> f32 {
    value.clamp(-f32::MAX, f32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use onebase_tensor::{MatrixRef, stream};
    use rand_distr::{Distribution, StandardNormal};

    fn decode(spec: &CodecSpec, delta: EncodedDelta) -> Vec<f32> {
        let [rows, cols] = delta.shape;
        let mut out = vec![f32::NAN; rows * cols];
        spec.prepare(delta).unwrap().write_rows(0..rows, &mut out);
        out
    }

    /// Powers of two and signs are exact in every type.
    #[test]
    fn a_rescaled_delta_is_the_delta_times_the_factor() {
        let (rows, cols) = (20, 70);
        let mut rng = stream(1, "w", 0);
        let data: Vec<f32> = (0..rows * cols).map(|_| StandardNormal.sample(&mut rng)).collect();
        for codec in RESCALABLE {
            for options in ["", ":bits=1", ":scale=matrix", ":order=low-rank-first"] {
                let Ok(spec) = format!("{}{options}", codec.name()).parse::<CodecSpec>() else {
                    continue;
                };
                let delta = spec.encode(&MatrixRef::new(&data, rows, cols).unwrap()).unwrap();
                let own = decode(&spec, delta.clone());
                for factor in [0.25, 1.0, -2.0] {
                    let mut scaled = delta.clone();
                    spec.rescale(&mut scaled, factor).unwrap();
                    let want: Vec<f32> = own.iter().map(|w| w * factor).collect();
                    assert_eq!(decode(&spec, scaled), want, "{spec} {factor}");
                }
                let mut huge = delta;
                spec.rescale(&mut huge, f32::MAX).unwrap();
                assert!(spec.prepare(huge).is_ok(), "{spec}");
            }
        }
    }

    #[test]
    fn other_codecs_say_which_can() {
        let spec: CodecSpec = "dqrelo-plus".parse().unwrap();
        let error = spec.rescalable().map(|_| ()).unwrap_err();
        assert!(matches!(error, Error::NotRescalable { codec: "dqrelo-plus", .. }));
        assert!(error.hint().unwrap().contains("sign"));
    }
}
