use std::path::Path;

use onebase_format::artifact::BaseRecord;
use onebase_format::statistics::{
    Measured, Source, StatisticsManifest, StatisticsWriter, input_name,
};
use onebase_model::Model;

use super::moments::{MomentRun, held_window};
use crate::compress::TOOL;
use crate::{Error, Progress, Result};

/// Measures the second moments of the inputs of every linear site of a model on tokens,
/// in windows of `window_tokens`, and writes them as statistics into the folder `target`,
/// which must not exist.
///
/// The model runs block by block, and what was measured of a block is written before the
/// next one is run: memory holds the residual stream of all tokens, and of one block the
/// moments, 12 bytes for each element. The same tokens give the same bytes on any number
/// of threads. `progress` counts tokens, each once for a block.
///
/// # Errors
/// When there is no token, one is outside the vocabulary, an input is no finite number, or
/// the folder cannot be written.
pub fn calibrate(
    model: &Model,
    tokens: &[u32],
    source: Source,
    window_tokens: usize,
    target: &Path,
    progress: &dyn Progress,
) -> Result<StatisticsManifest> {
    if tokens.is_empty() {
        return Err(Error::ShortText { n_tokens: 0, least: 1 });
    }
    let checkpoint = model.checkpoint();
    let mut run = MomentRun::new(model, tokens, window_tokens)?;
    let digests = model.digests()?.own.iter().map(|(name, digest)| (name.as_str(), *digest));
    let record = BaseRecord::new(&checkpoint.name(), digests);
    let sizes = [tokens.len(), held_window(model, window_tokens)];
    let mut writer = StatisticsWriter::create(target, TOOL, record, source, sizes)?;
    let n_layers = model.config().n_layers;
    progress.begin((tokens.len() * n_layers) as u64);
    let say = |layer: usize| progress.tensor(&format!("block {} of {n_layers}", layer + 1));
    say(0);
    while let Some((layer, moments)) = run.next_layer(|n| progress.advance(n as u64)) {
        let named: Vec<(String, _)> = moments.iter().map(|(i, m)| (i.to_string(), m)).collect();
        for (input, moment) in &named {
            #[allow(clippy::cast_possible_truncation)]
            let is_finite = |v: &f64| (*v as f32).is_finite();
            if !moment.values.iter().all(is_finite) {
                let (path, input) = (checkpoint.dir().to_owned(), input_name(layer, input));
                return Err(Error::InputNotFinite { path, input });
            }
        }
        let measured: Vec<Measured<'_>> = named
            .iter()
            .map(|(input, moment)| Measured {
                input,
                in_features: moment.in_features,
                moment: &moment.values,
            })
            .collect();
        writer.put_layer(layer, &measured)?;
        say((layer + 1).min(n_layers - 1));
    }
    Ok(writer.finish()?)
}
