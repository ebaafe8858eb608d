//! A model run one block at a time over many windows of tokens.

use super::{Batch, Logits, Pass, Segment};
use crate::observer::Observer;
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
    tenant: Option<&'a Tenant>,
    windows: Vec<Window<'a>>,
    next_layer: usize,
}

#[derive(Debug)]
struct Window<'a> {
    tokens: &'a [u32],
    /// `[n_tokens, hidden_size]`, before the next block.
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
        tenant: Option<&'a Tenant>,
    ) -> Result<Self> {
        let mut run = Self { model, tenant, windows: Vec::new(), next_layer: 0 };
        // A window without tokens shows nothing.
        for tokens in windows.into_iter().filter(|tokens| !tokens.is_empty()) {
            run.windows.push(Window { tokens, stream: Vec::new() });
        }
        for index in 0..run.windows.len() {
            let mut cache = KvCache::new(run.model.config());
            let segments = [run.segment(index, &mut cache)];
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

    /// Runs every window through the next block and shows the inputs of its linear sites
    /// to `observer`, window by window; `after` is told the number of tokens of each
    /// window when it is done. Once all blocks were run it does nothing.
    ///
    /// What is shown is what [`Model::forward_observed`] shows of the window alone, to the
    /// last bit.
    pub fn run_layer(&mut self, observer: &mut dyn Observer, mut after: impl FnMut(usize)) {
        let index = self.next_layer;
        let Some(layer) = self.model.decoder.layers.get(index) else { return };
        for at in 0..self.windows.len() {
            let mut stream = std::mem::take(&mut self.windows[at].stream);
            // Of the cache, the heads of this block alone are filled.
            let mut cache = KvCache::new(self.model.config());
            let mut segments = [self.segment(at, &mut cache)];
            let mut pass = Pass::new(self.model, Batch::new(&segments));
            std::mem::swap(&mut pass.stream, &mut stream);
            pass.attention(index, layer, &mut segments, observer);
            pass.feed_forward(index, layer, observer);
            self.windows[at].stream = pass.stream;
            after(self.windows[at].tokens.len());
        }
        self.next_layer += 1;
    }

    fn segment<'c>(&self, window: usize, cache: &'c mut KvCache) -> Segment<'c>
    where
        'a: 'c,
    {
        let (tokens, tenant) = (self.windows[window].tokens, self.tenant);
        Segment { tokens, tenant, cache, logits: Logits::None }
    }
}
