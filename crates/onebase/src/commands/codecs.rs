use onebase_codec::rqt::Rqt;
use onebase_codec::{CALIBRATED, CODECS, OptionSpec};
use serde_json::{Value, json};

use crate::output::{Output, table};

pub(crate) fn run(output: &Output) -> anyhow::Result<()> {
    let options = |options: &[OptionSpec]| -> Vec<Value> {
        let described = options.iter().map(|o| {
            json!({
                "name": o.name,
                "doc": o.doc,
                "default": o.default_value(),
                "expected": o.expected(),
            })
        });
        described.collect()
    };
    let mut codecs: Vec<Value> = CODECS
        .iter()
        .map(|codec| {
            json!({
                "name": codec.name(),
                "version": codec.version(),
                "summary": codec.summary(),
                "uses_statistics": CALIBRATED.iter().any(|c| c.name() == codec.name()),
                "options": options(codec.options()),
            })
        })
        .collect();
    codecs.push(json!({
        "name": Rqt::NAME,
        "version": Rqt::VERSION,
        "summary": Rqt::SUMMARY,
        "uses_statistics": false,
        "options": options(Rqt::OPTIONS),
    }));
    output.result(&json!({ "codecs": codecs }), || {
        let mut rows = Vec::new();
        let described = CODECS.iter().map(|c| (c.name(), c.summary(), c.options()));
        let family = (Rqt::NAME, Rqt::SUMMARY, Rqt::OPTIONS);
        for (name, summary, options) in described.chain([family]) {
            rows.push([name, "", "", summary].map(str::to_owned).to_vec());
            for option in options {
                let values = format!("{} [{}]", option.expected(), option.default_text());
                rows.push(vec![String::new(), option.name.into(), values, option.doc.into()]);
            }
        }
        table(&["codec", "option", "values [default]", ""], 4, rows).to_string()
    })
}
