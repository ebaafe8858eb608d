use std::path::PathBuf;
use std::time::Instant;

use anyhow::bail;
use onebase_format::Checkpoint;
use onebase_format::artifact::Artifact;
use onebase_format::family::Family;
use onebase_model::{
    Generation, Message, Model, Request, SamplingParams, Tenant, TextModel, generate,
};
use serde_json::json;

use crate::args::GenerateArgs;
use crate::output::Output;

/// Somebody who answers: the base, or a tenant.
struct Voice {
    name: String,
    tenant: Option<Tenant>,
    text: TextModel,
}

pub(crate) fn run(args: &GenerateArgs, output: &Output) -> anyhow::Result<()> {
    let model = Model::load(Checkpoint::open(&args.base)?)?;
    let voices = voices(args, &model)?;
    let sampling = SamplingParams {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
    };
    let mut requests = Vec::new();
    let mut asked = Vec::new();
    for prompt in &args.prompts {
        for voice in &voices {
            requests.push(Request {
                tenant: voice.tenant.as_ref(),
                prompt: tokens(args, voice, prompt)?,
                max_new_tokens: args.max_new_tokens,
                sampling,
                stop_tokens: &voice.text.stop_tokens,
                stop_texts: &args.stop,
                tokenizer: Some(&voice.text.tokenizer),
            });
            asked.push((prompt, &voice.name));
        }
    }
    let start = Instant::now();
    let generation = generate(&model, &requests, args.batch_size.into(), |_| {})?;
    let seconds = start.elapsed().as_secs_f64();
    print(&asked, &generation, seconds, output)
}

fn voices(args: &GenerateArgs, model: &Model) -> anyhow::Result<Vec<Voice>> {
    let mut voices: Vec<Voice> = Vec::new();
    let mut deltas: Vec<(String, PathBuf)> = Vec::new();
    if let Some(dir) = &args.family {
        let family = Family::open(dir)?;
        for name in family.tenants()? {
            let artifact = family.tenant_folder(&name)?;
            deltas.push((name, artifact));
        }
    }
    deltas.extend(args.deltas.iter().map(|delta| (delta.name.clone(), delta.artifact.clone())));
    if args.with_base || deltas.is_empty() {
        let text = TextModel::from_checkpoint(model.checkpoint())?;
        voices.push(Voice { name: "base".to_owned(), tenant: None, text });
    }
    for (name, artifact) in deltas {
        if voices.iter().any(|voice| voice.name == name) {
            bail!("the name {name} is given twice");
        }
        let artifact = Artifact::open(&artifact)?;
        let tenant = Some(Tenant::load(model, &artifact)?);
        let text = TextModel::from_artifact(&artifact, model.checkpoint())?;
        voices.push(Voice { name, tenant, text });
    }
    Ok(voices)
}

fn tokens(args: &GenerateArgs, voice: &Voice, prompt: &str) -> anyhow::Result<Vec<u32>> {
    if args.raw {
        return Ok(voice.text.tokenizer.encode(prompt, true)?);
    }
    let message =
        |role: &str, content: &str| Message { role: role.to_owned(), content: content.to_owned() };
    let system = args.system.iter().map(|text| message("system", text));
    let messages: Vec<Message> = system.chain([message("user", prompt)]).collect();
    Ok(voice.text.encode_chat(&messages)?)
}

fn print(
    asked: &[(&String, &String)],
    generation: &Generation,
    seconds: f64,
    output: &Output,
) -> anyhow::Result<()> {
    let answers = || asked.iter().zip(&generation.completions);
    let list: Vec<_> = answers()
        .map(|((prompt, name), completion)| {
            json!({
                "model": name,
                "prompt": prompt,
                "text": completion.text,
                "tokens": completion.tokens,
                "finish_reason": completion.finish_reason.name(),
            })
        })
        .collect();
    let object = json!({
        "answers": list,
        "prompt_tokens": generation.n_prompt_tokens,
        "new_tokens": generation.n_new_tokens,
        "seconds": seconds,
    });
    output.result(&object, || {
        let mut text = String::new();
        let mut last = None;
        let width = asked.iter().map(|(_, name)| name.chars().count()).max().unwrap_or(0);
        for ((prompt, name), completion) in answers() {
            if asked.len() > 1 && last != Some(prompt) {
                text.push_str(&format!("> {prompt}\n"));
                last = Some(prompt);
            }
            if asked.len() > 1 {
                text.push_str(&format!("{name:>width$}  "));
            }
            let indent = format!("\n{:width$}  ", "");
            let answer = completion.text.trim_end();
            text.push_str(&if asked.len() > 1 {
                answer.replace('\n', &indent)
            } else {
                answer.into()
            });
            text.push('\n');
        }
        text
    })?;
    let n = generation.n_new_tokens;
    #[allow(clippy::cast_precision_loss)]
    let rate = n as f64 / seconds.max(1e-9);
    Output::note(&format!(
        "{} prompt tokens, {n} new tokens in {seconds:.2} s, {rate:.1} per second",
        generation.n_prompt_tokens
    ));
    Ok(())
}
