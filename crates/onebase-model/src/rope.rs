use crate::config::{ModelConfig, RopeScaling};

/// Rotary position embedding (J. Su et al., "RoFormer", 2021), in the layout of
/// transformers: feature `i` of a head turns with feature `i + head_dim / 2`.
#[derive(Debug)]
pub(crate) struct Rope {
    /// `[head_dim / 2]`.
    inverse_frequencies: Vec<f32>,
}

impl Rope {
    pub(crate) fn new(config: &ModelConfig) -> Self {
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)]
        let inverse_frequencies = (0..config.head_dim / 2)
            .map(|i| {
                let exponent = 2.0 * i as f64 / config.head_dim as f64;
                scale(config.rope_theta.powf(-exponent), config.rope_scaling) as f32
            })
            .collect();
        Self { inverse_frequencies }
    }

    /// Writes the cosines and sines of a position, `[head_dim / 2]` each.
    ///
    /// The angle is a product in f32, as in the reference implementations.
    pub(crate) fn write(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        #[allow(clippy::cast_precision_loss)]
        let position = position as f32;
        for ((f, cos), sin) in self.inverse_frequencies.iter().zip(cos).zip(sin) {
            let (s, c) = f64::from(f * position).sin_cos();
            #[allow(clippy::cast_possible_truncation)]
            {
                (*cos, *sin) = (c as f32, s as f32);
            }
        }
    }
}

/// Turns one head in place.
pub(crate) fn rotate(head: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = head.split_at_mut(cos.len());
    for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
        (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
    }
}

/// The scaled inverse frequency. Llama 3's rule (Llama 3.1 release): wavelengths
/// shorter than `original_context / high_freq_factor` are kept, longer than
/// `original_context / low_freq_factor` divided, those between interpolated.
fn scale(inverse_frequency: f64, scaling: RopeScaling) -> f64 {
    match scaling {
        RopeScaling::Default => inverse_frequency,
        RopeScaling::Linear { factor } => inverse_frequency / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let turns = original_context * inverse_frequency / std::f64::consts::TAU;
            if turns > high_freq_factor {
                inverse_frequency
            } else if turns < low_freq_factor {
                inverse_frequency / factor
            } else {
                let smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - smooth) * inverse_frequency / factor + smooth * inverse_frequency
            }
        }
    }
}
