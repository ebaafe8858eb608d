use std::sync::Arc;

use onebase_kernels::PackedFormat;

use crate::ModelConfig;

/// Positions of a page.
const PAGE_TOKENS: usize = 32;

/// Keys and values of one sequence, in pages that grow with the sequence and that sequences
/// with a common beginning share.
#[derive(Clone, Debug)]
pub struct KvCache {
    layout: Layout,
    n_tokens: usize,
    pages: Vec<Arc<Page>>,
}

/// How a page is laid out: by layer, key head, and keys before values, [`PAGE_TOKENS`] rows.
#[derive(Clone, Copy, Debug)]
struct Layout {
    n_kv_heads: usize,
    /// Layers times key heads.
    n_heads: usize,
    head_dim: usize,
    /// `None` where rows are f32.
    packed: Option<PackedFormat>,
}

/// Rows of all layers and heads for some positions.
#[derive(Clone, Debug)]
enum Page {
    F32(Vec<f32>),
    Packed(Vec<u8>),
}

/// Keys and values of a head over some positions, page by page.
#[derive(Debug, Default)]
pub(crate) struct Window<'a, T> {
    /// Whole rows each.
    pub(crate) keys: Vec<&'a [T]>,
    /// As many rows each as the keys have.
    pub(crate) values: Vec<&'a [T]>,
}

impl Layout {
    /// Elements of a row: f32 or bytes.
    fn row(self) -> usize {
        self.packed.map_or(self.head_dim, PackedFormat::row_bytes)
    }

    /// Elements of a page.
    fn page(self) -> usize {
        self.n_heads * 2 * PAGE_TOKENS * self.row()
    }

    /// Where the row of a position within its page begins; `which` is 0 for keys, 1 for values.
    fn at(self, layer: usize, head: usize, which: usize, position: usize) -> usize {
        let head = layer * self.n_kv_heads + head;
        ((head * 2 + which) * PAGE_TOKENS + position) * self.row()
    }
}

impl KvCache {
    /// An empty cache for a model of this configuration.
    pub fn new(config: &ModelConfig) -> Self {
        let layout = Layout {
            n_kv_heads: config.n_kv_heads,
            n_heads: config.n_layers * config.n_kv_heads,
            head_dim: config.head_dim,
            packed: config.kv_format(),
        };
        Self { layout, n_tokens: 0, pages: Vec::new() }
    }

    /// Positions that were run.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// The first `n_tokens` positions, at most all, as a sequence of its own: whole pages are
    /// shared, and what either appends the other does not see.
    pub fn prefix(&self, n_tokens: usize) -> Self {
        let n_tokens = n_tokens.min(self.n_tokens);
        let pages = self.pages[..n_tokens.div_ceil(PAGE_TOKENS)].to_vec();
        Self { layout: self.layout, n_tokens, pages }
    }

    /// Bytes that a position takes, in all layers.
    pub fn bytes_per_token(config: &ModelConfig) -> usize {
        let rows = config.n_layers * config.n_kv_heads * 2;
        match config.kv_format() {
            None => rows * config.head_dim * size_of::<f32>(),
            Some(format) => rows * format.row_bytes(),
        }
    }

    /// Bytes of its pages, those that it shares included.
    pub fn size_bytes(&self) -> usize {
        let element = if self.layout.packed.is_some() { 1 } else { size_of::<f32>() };
        self.pages.len() * self.layout.page() * element
    }

    /// Stores a position's keys and values, `[n_kv_heads, head_dim]` each.
    pub(crate) fn write(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        let layout = self.layout;
        while self.pages.len() * PAGE_TOKENS <= position {
            // Zeroed memory that nothing touches takes no space: a page in use by some layers
            // alone costs as much as those.
            self.pages.push(Arc::new(match layout.packed {
                None => Page::F32(vec![0.0; layout.page()]),
                Some(_) => Page::Packed(vec![0; layout.page()]),
            }));
        }
        let page = Arc::make_mut(&mut self.pages[position / PAGE_TOKENS]);
        for (which, rows) in [keys, values].into_iter().enumerate() {
            for (head, row) in rows.chunks_exact(layout.head_dim).enumerate() {
                let at = layout.at(layer, head, which, position % PAGE_TOKENS);
                match (&mut *page, layout.packed) {
                    (Page::Packed(bytes), Some(format)) => {
                        format.pack(row, &mut bytes[at..at + layout.row()]);
                    }
                    (Page::F32(elements), _) => {
                        elements[at..at + layout.row()].copy_from_slice(row);
                    }
                    (Page::Packed(_), None) => unreachable!("a page is of its cache's layout"),
                }
            }
        }
    }

    /// Keys and values of positions `first..=last` of a head, where rows are f32; `None` where
    /// they are packed.
    pub(crate) fn window(
        &self,
        layer: usize,
        head: usize,
        first: usize,
        last: usize,
    ) -> Option<Window<'_, f32>> {
        self.slices(layer, head, first, last, |page| match page {
            Page::F32(elements) => Some(elements.as_slice()),
            Page::Packed(_) => None,
        })
    }

    /// [`KvCache::window`] of packed rows, and their format; `None` where they are f32.
    pub(crate) fn packed_window(
        &self,
        layer: usize,
        head: usize,
        first: usize,
        last: usize,
    ) -> Option<(PackedFormat, Window<'_, u8>)> {
        let window = self.slices(layer, head, first, last, |page| match page {
            Page::F32(_) => None,
            Page::Packed(bytes) => Some(bytes.as_slice()),
        });
        self.layout.packed.zip(window)
    }

    fn slices<'a, T>(
        &'a self,
        layer: usize,
        head: usize,
        first: usize,
        last: usize,
        elements: impl Fn(&'a Page) -> Option<&'a [T]>,
    ) -> Option<Window<'a, T>> {
        let mut window = Window { keys: Vec::new(), values: Vec::new() };
        for index in first / PAGE_TOKENS..=last / PAGE_TOKENS {
            let page = elements(&self.pages[index])?;
            let from = first.saturating_sub(index * PAGE_TOKENS);
            let to = PAGE_TOKENS.min(last + 1 - index * PAGE_TOKENS);
            let rows = |which| {
                &page[self.layout.at(layer, head, which, from)
                    ..self.layout.at(layer, head, which, to)]
            };
            window.keys.push(rows(0));
            window.values.push(rows(1));
        }
        Some(window)
    }

    /// Counts positions whose keys and values every layer has stored.
    pub(crate) fn advance(&mut self, n_tokens: usize) {
        self.n_tokens += n_tokens;
    }
}
