//! Statistics of what a model's linear sites read, measured on some tokens: a folder with
//! the second moment of every input, block by block. See `SPEC.md` for the layout.

mod manifest;
mod reader;
mod writer;

pub use manifest::{
    InputRecord, STATISTICS_FILE, STATISTICS_FORMAT, STATISTICS_VERSION, SequentialRecord, Source,
    StatisticsManifest, StatisticsRecord, input_name,
};
pub use reader::Statistics;
pub use writer::{Measured, StatisticsWriter};
