use onebase_codec::{CALIBRATED, CODECS};
use serde_json::{Value, json};

use crate::output::{Output, table};

pub(crate) fn run(output: &Output) -> anyhow::Result<()> {
    let codecs: Vec<Value> = CODECS
        .iter()
        .map(|codec| {
            let options = codec.options().iter().map(|o| {
                json!({
                    "name": o.name,
                    "doc": o.doc,
                    "default": o.default_value(),
                    "expected": o.expected(),
                })
            });
            json!({
                "name": codec.name(),
                "version": codec.version(),
                "summary": codec.summary(),
                "uses_statistics": CALIBRATED.iter().any(|c| c.name() == codec.name()),
                "options": options.collect::<Vec<_>>(),
            })
        })
        .collect();
    output.result(&json!({ "codecs": codecs }), || {
        let mut rows = Vec::new();
        for codec in CODECS {
            let first = [codec.name(), "", "", codec.summary()];
            rows.push(first.map(str::to_owned).to_vec());
            for option in codec.options() {
                let values = format!("{} [{}]", option.expected(), option.default_text());
                rows.push(vec![String::new(), option.name.into(), values, option.doc.into()]);
            }
        }
        table(&["codec", "option", "values [default]", ""], 4, rows).to_string()
    })
}
