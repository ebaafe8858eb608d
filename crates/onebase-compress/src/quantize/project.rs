//! Second moments of what is rotated (ResQ, section 4.2): of the residual stream where sites
//! read it, of keys and of values.

use onebase_model::{LayerRun, Model, ModelConfig, Observer, SiteInput};
use onebase_tensor::MatrixRef;

use super::folder::read_f32;
use crate::calibration::{add_moment, held_window};
use crate::{Progress, Result};

/// Second moments, none of them centred, up to a factor.
pub(super) struct Moments {
    /// Of the normalised inputs of attention and feed-forward parts without the norms' weights,
    /// over all blocks: `[hidden_size, hidden_size]`.
    pub(super) hidden: Vec<f64>,
    /// By layer, over its key heads, after the rotary embedding: `[head_dim, head_dim]`.
    pub(super) keys: Vec<Vec<f64>>,
    /// By layer and key head: `[head_dim, head_dim]`.
    pub(super) values: Vec<Vec<f64>>,
}

impl Moments {
    /// Measures them on tokens, block by block.
    pub(super) fn measure(
        model: &Model,
        tokens: &[u32],
        window_tokens: usize,
        progress: &dyn Progress,
    ) -> Result<Self> {
        let config = model.config();
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let mut moments =
            Self { hidden: vec![0.0; hidden * hidden], keys: Vec::new(), values: Vec::new() };
        let windows = tokens.chunks(held_window(model, window_tokens));
        let mut run = LayerRun::new(model, windows, None)?;
        progress.begin((tokens.len() * config.n_layers) as u64);
        for layer in 0..config.n_layers {
            progress.tensor(&format!("block {} of {}", layer + 1, config.n_layers));
            let mut watcher = Watcher {
                config,
                inputs: [vec![0.0; hidden * hidden], vec![0.0; hidden * hidden]],
                keys: vec![0.0; head * head],
                values: vec![vec![0.0; head * head]; config.n_kv_heads],
            };
            run.run_layer(None, &mut watcher, |n| progress.advance(n as u64));
            for (input, norm) in
                watcher.inputs.iter().zip(["input_layernorm", "post_attention_layernorm"])
            {
                let name = format!("model.layers.{layer}.{norm}.weight");
                let gains = read_f32(&model.checkpoint().tensor(&name)?)?;
                add_without_gains(&mut moments.hidden, input, &gains);
            }
            moments.keys.push(watcher.keys);
            moments.values.extend(watcher.values);
        }
        Ok(moments)
    }
}

/// Adds the moment of inputs divided by a norm's weights. What a weight of zero hides is not
/// known, and of no account.
fn add_without_gains(sum: &mut [f64], moment: &[f64], gains: &[f32]) {
    let n = gains.len();
    let inverse = |gain: &f32| if *gain == 0.0 { 0.0 } else { 1.0 / f64::from(*gain) };
    let inverses: Vec<f64> = gains.iter().map(inverse).collect();
    let rows = sum.chunks_exact_mut(n).zip(moment.chunks_exact(n)).zip(&inverses);
    for ((sum, moment), by) in rows {
        for ((sum, m), other) in sum.iter_mut().zip(moment).zip(&inverses) {
            *sum += m * by * other;
        }
    }
}

/// Gathers the moments of one block.
struct Watcher<'a> {
    config: &'a ModelConfig,
    /// Of attention and of the feed-forward part.
    inputs: [Vec<f64>; 2],
    keys: Vec<f64>,
    values: Vec<Vec<f64>>,
}

impl Observer for Watcher<'_> {
    fn observe(&mut self, _: usize, input: SiteInput, x: MatrixRef<'_>) {
        match input {
            SiteInput::Attention => add_moment(&mut self.inputs[0], x),
            SiteInput::FeedForward => add_moment(&mut self.inputs[1], x),
            _ => {}
        }
    }

    fn observe_heads(&mut self, _: usize, keys: MatrixRef<'_>, values: MatrixRef<'_>) {
        let (head, n_heads) = (self.config.head_dim, self.config.n_kv_heads);
        let of_head = |all: MatrixRef<'_>, index: usize| -> Vec<f32> {
            let rows = all.data().chunks_exact(n_heads * head);
            rows.flat_map(|row| row[index * head..(index + 1) * head].to_vec()).collect()
        };
        for (index, sum) in self.values.iter_mut().enumerate() {
            for (moment, all) in [(&mut self.keys, keys), (sum, values)] {
                let rows = of_head(all, index);
                if let Ok(x) = MatrixRef::new(&rows, rows.len() / head, head) {
                    add_moment(moment, x);
                }
            }
        }
    }
}
