use onebase_codec::numerics::{
    Eigen, gram_of_shorter_side, product, product_transposed, symmetric_eigen,
    symmetric_eigenvalues,
};
use onebase_codec::{DeltaSource, read_wide};
use onebase_compress::Pair;
use onebase_model::TensorSpec;

use crate::Result;
use crate::activations::SecondMoment;
use crate::limit::{Shrunk, Spectrum};

/// The spectrum of a site's delta.
pub(crate) fn weight_spectrum(pair: &Pair, spec: &TensorSpec) -> Result<Spectrum> {
    let source = pair.delta(&spec.name)?;
    let (gram, n) = gram_of_shorter_side(&source).map_err(|e| source.explain(e))?;
    Ok(Spectrum::new(&symmetric_eigenvalues(&gram, n)?, source.shape()))
}

/// The spectrum of the outputs of a site's delta, `Δ H^½` for the second moment `H`
/// of its inputs.
///
/// The rows of the delta are draws of a Gaussian with a covariance `Σ`, which is
/// estimated from them in the directions of their own and shrunk; `H` is known. The
/// variances are the eigenvalues of `Σ^½ H Σ^½`.
pub(crate) fn output_spectrum(
    pair: &Pair,
    spec: &TensorSpec,
    moment: &SecondMoment,
) -> Result<Spectrum> {
    let source = pair.delta(&spec.name)?;
    let [m, n] = source.shape();
    let (gram, k) = gram_of_shorter_side(&source).map_err(|e| source.explain(e))?;
    let Eigen { values, mut vectors } = symmetric_eigen(&gram, k)?;
    let largest = values.first().copied().unwrap_or(0.0);
    let n_directions = values.iter().take_while(|v| **v > largest * 1e-12).count();
    let values = &values[..n_directions];
    if m < n {
        // The left directions to the right ones.
        let delta = read_wide(&source, 0..m).map_err(|e| source.explain(e))?;
        vectors = product(&vectors[..n_directions * m], &delta, [n_directions, m, n]);
        for (vector, value) in vectors.chunks_mut(n).zip(values) {
            let length = value.sqrt();
            vector.iter_mut().for_each(|v| *v /= length);
        }
    } else {
        vectors.truncate(n_directions * n);
    }
    let Shrunk { variances, rest } = Shrunk::new(values, m, n);
    // Σ^½ = √rest · I + Σ (√variance − √rest) v vᵀ.
    let mut scaled = vectors.clone();
    for (vector, variance) in scaled.chunks_mut(n.max(1)).zip(&variances) {
        let factor = variance.sqrt() - rest.sqrt();
        vector.iter_mut().for_each(|v| *v *= factor);
    }
    let transposed = |a: &[f64], rows: usize| -> Vec<f64> {
        (0..rows * n).map(|i| a[i % rows * n + i / rows]).collect()
    };
    let mut root = product(&transposed(&scaled, n_directions), &vectors, [n, n_directions, n]);
    root.iter_mut().step_by(n + 1).for_each(|diagonal| *diagonal += rest.sqrt());
    let weighted = product(&root, &moment.values, [n, n, n]);
    let variances = symmetric_eigenvalues(&product_transposed(&weighted, &root, [n, n, n]), n)?;
    // The energy that is there, which the shrinkage keeps in the weights alone.
    let energy = crate::site_error::output_energy(pair, spec, moment)?;
    Ok(Spectrum::known(variances, m, energy))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use onebase_format::Checkpoint;
    use onebase_tensor::{DType, stream};
    use rand_distr::{Distribution, StandardNormal};

    use super::*;
    use crate::limit::Limit;

    /// A pair whose delta is independent equal Gaussians, and nothing else.
    fn pair(folder: &Path) -> Pair {
        let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../demo/base");
        let base = Checkpoint::open(&demo).unwrap();
        let staged = onebase_format::StagedFolder::create(folder).unwrap();
        let mut entries = Vec::new();
        for name in base.names() {
            let shape = base.tensor(name).unwrap().shape().to_vec();
            entries.push(onebase_format::TensorEntry {
                name: name.to_owned(),
                dtype: DType::F32,
                shape,
            });
        }
        let path = staged.path("model.safetensors");
        let mut writer = onebase_format::TensorWriter::create(&path, &entries).unwrap();
        for entry in &entries {
            let tensor = base.tensor(&entry.name).unwrap();
            let mut weights = vec![0.0; tensor.n_weights()];
            tensor.dtype().widen(&tensor.bytes(), &mut weights);
            let mut rng = stream(2, &entry.name, 0);
            for weight in &mut weights {
                let drawn: f32 = StandardNormal.sample(&mut rng);
                *weight += 0.01 * drawn;
            }
            let bytes: Vec<u8> = weights.into_iter().flat_map(f32::to_le_bytes).collect();
            writer.write(&bytes).unwrap();
        }
        writer.finish().unwrap();
        for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
            staged.write(name, &base.side_file(name).unwrap().unwrap()).unwrap();
        }
        staged.commit().unwrap();
        Pair::open(&demo, folder).unwrap()
    }

    /// For such a delta the variances of the outputs are those of the inputs, which are
    /// known: tall, square and wide.
    #[test]
    fn outputs_of_independent_gaussians_are_as_varied_as_the_inputs() {
        let place = tempfile::tempdir().unwrap();
        let pair = pair(&place.path().join("gaussian"));
        for site in ["mlp.up_proj", "self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"] {
            let name = format!("model.layers.1.{site}.weight");
            let spec = pair.specs().iter().find(|spec| spec.name == name).unwrap();
            let [m, n] = [spec.shape[0], spec.shape[1]];
            #[allow(clippy::cast_precision_loss)]
            let inputs: Vec<f64> = (0..n).map(|k| 1.0 / (k + 1) as f64).collect();
            let mut values = vec![0.0; n * n];
            inputs.iter().enumerate().for_each(|(k, v)| values[k * (n + 1)] = *v);
            #[allow(clippy::cast_possible_truncation)]
            let narrow = values.iter().map(|v| *v as f32).collect();
            let moment = SecondMoment { values, narrow };
            let got = output_spectrum(&pair, spec, &moment).unwrap();
            let n_weights = (m * n) as u64;
            let energy = inputs.iter().sum::<f64>() * m as f64;
            let known = Spectrum::known(inputs, m, energy);
            let [got, known] = [got, known].map(|s| Limit::new(vec![s], n_weights));
            for error in [0.3, 0.1, 0.03] {
                let [got, known] = [&got, &known].map(|limit| limit.bits(error).unwrap());
                assert!((got - known).abs() < 0.05, "{site}, {error}: {got}, not {known}");
            }
        }
    }
}
