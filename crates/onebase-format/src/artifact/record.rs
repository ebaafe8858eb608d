use serde_json::{Map, Value};

use super::manifest::{MANIFEST_FILE, MODEL_CARD_FILE, manifest_text};
use super::writer::settle_card;
use super::{Artifact, Manifest, Quality, Sizes};
use crate::atomic::write_file;
use crate::checkpoint::{read_json, read_optional};
use crate::{Error, Result};

impl Artifact {
    /// Writes a quality record into the manifest, in place of an earlier one, and
    /// a new model card, which `model_card` makes from the manifest, the sizes and
    /// the text of the card that is there, if any.
    ///
    /// Each file is replaced as a whole, the manifest first. Fields of the
    /// manifest that this version does not know are kept.
    ///
    /// # Errors
    /// When a file cannot be read or written.
    pub fn record_quality(
        &self,
        quality: &Quality,
        model_card: impl Fn(&Manifest, &Sizes, Option<&str>) -> String,
    ) -> Result<Sizes> {
        let path = self.dir().join(MANIFEST_FILE);
        let bad = |source| Error::Json { path: path.clone(), source };
        let mut fields: Map<String, Value> = read_json(&path)?;
        fields.insert("quality".to_owned(), serde_json::to_value(quality).map_err(bad)?);
        let text = manifest_text(&fields).map_err(bad)?;
        let manifest = serde_json::from_value(Value::Object(fields)).map_err(bad)?;
        let card_path = self.dir().join(MODEL_CARD_FILE);
        let previous = read_optional(&card_path)?;
        let previous = previous.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
        let (card, sizes) = settle_card(&manifest, text.len(), |sizes| {
            model_card(&manifest, sizes, previous.as_deref())
        });
        write_file(&path, text.as_bytes())?;
        write_file(&card_path, card.as_bytes())?;
        Ok(sizes)
    }
}
