//! A model run one block at a time over many windows of tokens.

use super::{Batch, Logits, Pass, Segment, matrix};
use crate::decoder::Layer;
use crate::linear::Linear;
use crate::observer::{Nobody, Observer, SiteInput};
use crate::{KvCache, Model, Result, Tenant};

/// Windows of tokens, each a document of its own, that go through a model block by block:
/// all of them through one block before any goes through the next, so that each weight is
/// read once however many windows there are, and whoever observes needs to hold what it
/// gathers of one block alone.
///
/// Its memory is the residual stream of every window, `hidden_size` in f32 for each token,
/// and the buffers and the cache of one window in one block.
#[derive(Debug)]
pub struct LayerRun<'a> {
    model: &'a Model,
    windows: Vec<Window<'a>>,
    next_layer: usize,
    /// Whether the streams are past the attention of that block.
    attended: bool,
}

#[derive(Debug)]
struct Window<'a> {
    tokens: &'a [u32],
    /// `[n_tokens, hidden_size]`, before the next part of a block.
    stream: Vec<f32>,
}

impl<'a> LayerRun<'a> {
    /// Embeds the tokens of windows, with a tenant's weights or, `None`, the base's own.
    ///
    /// # Errors
    /// When a token is outside the vocabulary.
    pub fn new(
        model: &'a Model,
        windows: impl IntoIterator<Item = &'a [u32]>,
        tenant: Option<&Tenant>,
    ) -> Result<Self> {
        let mut run = Self { model, windows: Vec::new(), next_layer: 0, attended: false };
        // A window without tokens shows nothing.
        for tokens in windows.into_iter().filter(|tokens| !tokens.is_empty()) {
            run.windows.push(Window { tokens, stream: Vec::new() });
        }
        for index in 0..run.windows.len() {
            let mut cache = KvCache::new(run.model.config());
            let segments = [run.segment(index, tenant, &mut cache)];
            model.check_vocabulary(&segments)?;
            let mut pass = Pass::new(model, Batch::new(&segments));
            pass.embed();
            run.windows[index].stream = pass.stream;
        }
        Ok(run)
    }

    /// The block that is run next; the number of blocks when all were run.
    pub fn next_layer(&self) -> usize {
        self.next_layer
    }

    /// Runs every window through the next block, or what is left of it after
    /// [`LayerRun::run_attention`], and shows the inputs of its linear sites to `observer`,
    /// window by window; `after` is told the number of tokens of each window when it is
    /// done. Once all blocks were run it does nothing.
    ///
    /// What is shown is what [`Model::forward_observed`] shows of the window alone, to the
    /// last bit, where the tenant is the one that the windows were embedded with.
    pub fn run_layer(
        &mut self,
        tenant: Option<&Tenant>,
        observer: &mut dyn Observer,
        mut after: impl FnMut(usize),
    ) {
        let (index, attended) = (self.next_layer, self.attended);
        let Some(layer) = self.model.decoder.layers.get(index) else { return };
        for at in 0..self.windows.len() {
            let stream = std::mem::take(&mut self.windows[at].stream);
            self.windows[at].stream = self.pass(at, stream, tenant, |pass, segments| {
                if !attended {
                    pass.attention(index, layer, segments, observer);
                }
                pass.feed_forward(index, layer, observer);
            });
            after(self.windows[at].tokens.len());
        }
        self.next_layer += 1;
        self.attended = false;
    }

    /// Runs every window through the attention of the next block, what it adds to the stream
    /// included; the feed-forward part is left to [`LayerRun::run_layer`]. It does nothing
    /// where that was done, and once all blocks were run.
    pub fn run_attention(&mut self, tenant: Option<&Tenant>) {
        let index = self.next_layer;
        let Some(layer) = self.model.decoder.layers.get(index) else { return };
        if self.attended {
            return;
        }
        for at in 0..self.windows.len() {
            let stream = std::mem::take(&mut self.windows[at].stream);
            self.windows[at].stream = self.pass(at, stream, tenant, |pass, segments| {
                pass.attention(index, layer, segments, &mut Nobody);
            });
        }
        self.attended = true;
    }

    /// Shows one input of the next block to `observer`, window by window, as
    /// [`LayerRun::run_layer`] would, and leaves the windows where they are: the block is
    /// run as far as the input needs it and no further.
    ///
    /// Nothing is shown of an input that the block does not have or, once its attention was
    /// run, that comes before that.
    pub fn peek(&self, tenant: Option<&Tenant>, input: SiteInput, observer: &mut dyn Observer) {
        let (index, attended) = (self.next_layer, self.attended);
        let Some(layer) = self.model.decoder.layers.get(index) else { return };
        let of_attention = matches!(input, SiteInput::Attention | SiteInput::AttentionOutput);
        if of_attention && attended {
            return;
        }
        for at in 0..self.windows.len() {
            let stream = self.windows[at].stream.clone();
            self.pass(at, stream, tenant, |pass, segments| {
                if !of_attention && !attended {
                    pass.attention(index, layer, segments, &mut Nobody);
                }
                pass.peek(index, layer, input, segments, observer);
            });
        }
    }

    /// What is left of a window's stream after a part of a block.
    fn pass(
        &self,
        window: usize,
        mut stream: Vec<f32>,
        tenant: Option<&Tenant>,
        part: impl FnOnce(&mut Pass<'_, '_>, &mut [Segment<'_>]),
    ) -> Vec<f32> {
        // Of the cache, the heads of this block alone are filled.
        let mut cache = KvCache::new(self.model.config());
        let mut segments = [self.segment(window, tenant, &mut cache)];
        let mut pass = Pass::new(self.model, Batch::new(&segments));
        std::mem::swap(&mut pass.stream, &mut stream);
        part(&mut pass, &mut segments);
        pass.stream
    }

    fn segment<'c>(
        &self,
        window: usize,
        tenant: Option<&'c Tenant>,
        cache: &'c mut KvCache,
    ) -> Segment<'c>
    where
        'a: 'c,
    {
        let tokens = self.windows[window].tokens;
        Segment { tokens, tenant, cache, logits: Logits::None }
    }
}

impl Pass<'_, '_> {
    /// Shows one input of a block, the stream being the one that its half of the block
    /// begins with.
    fn peek(
        &mut self,
        index: usize,
        layer: &Layer<Linear, Vec<f32>>,
        input: SiteInput,
        segments: &mut [Segment<'_>],
        observer: &mut dyn Observer,
    ) {
        let n = self.batch.rows.len();
        match (input, &layer.router) {
            (SiteInput::Attention, _) => {
                self.attention_input(index, layer);
                observer.observe(index, input, matrix(&self.x, n));
            }
            (SiteInput::AttentionOutput, _) => {
                self.attention_input(index, layer);
                self.heads(index, layer, segments, &mut Nobody);
                observer.observe(index, input, matrix(&self.attended, n));
            }
            (SiteInput::FeedForward, None) => {
                self.feed_forward_input(index, layer);
                observer.observe(index, input, matrix(&self.x, n));
            }
            (SiteInput::FeedForwardOutput, None) => {
                self.feed_forward_input(index, layer);
                self.gated(index, &layer.mlps[0]);
                observer.observe(index, input, matrix(&self.gate, n));
            }
            (SiteInput::Expert(_) | SiteInput::ExpertOutput(_), Some(router)) => {
                self.feed_forward_input(index, layer);
                self.peek_expert(index, router, &layer.mlps, input, observer);
            }
            (SiteInput::FeedForward | SiteInput::FeedForwardOutput, Some(_))
            | (SiteInput::Expert(_) | SiteInput::ExpertOutput(_), None) => {}
        }
    }
}
