//! Writes a model as a folder that `transformers` loads.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, config, weights};
use crate::durable;
use crate::error::CheckpointError;
use crate::file::write_f32;
use crate::source::ModelSource;

// What families call the end of a text, in the order they are looked for.
const END_NAMES: [&str; 5] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot_id|>", "<eos>"];

/// Writes `config.json`, `model.safetensors` (f32), and, where the source has a tokenizer,
/// `tokenizer.json` with its `tokenizer_config.json`, and `generation_config.json` to `folder`.
/// The optimizer's tensors stay behind. The configuration comes last.
///
/// # Errors
/// [`CheckpointError::Tensor`] when a weight of the model is missing or has another shape;
/// [`CheckpointError::Io`].
pub fn export(source: &ModelSource, folder: &Path) -> Result<(), CheckpointError> {
    let weights = weights(&source.model);
    for (name, shape) in &weights {
        let message = match source.reader.shape(name) {
            None => "it is not in the checkpoint".to_owned(),
            Some(got) if got != shape => format!("its shape is {got:?}, the model's is {shape:?}"),
            Some(_) => continue,
        };
        let name = name.clone();
        return Err(CheckpointError::Tensor { name, message });
    }
    durable::create_folder(folder).map_err(CheckpointError::io(folder))?;
    let mut names = weights.iter();
    // One tensor in memory at a time.
    write_f32(&folder.join(WEIGHTS_FILE), &weights, &mut |sink| match names.next() {
        Some((name, _)) => sink(&source.reader.read_whole(name)?),
        None => Ok(()),
    })?;
    let mut end_of_text = None;
    if let Some(path) = &source.tokenizer {
        let text = fs::read(path).map_err(CheckpointError::io(path))?;
        let end = find_end(path, &text)?;
        let copy = folder.join(TOKENIZER_FILE);
        durable::write(&copy, &text).map_err(CheckpointError::io(&copy))?;
        let name = end.as_ref().map(|(name, _)| name.as_str());
        let about = json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": source.model.context,
            "bos_token": name,
            "eos_token": name,
            "clean_up_tokenization_spaces": false,
        });
        write_json(&folder.join("tokenizer_config.json"), &about)?;
        end_of_text = end.map(|(_, id)| id);
    }
    let generation = json!({
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "_from_model_config": true,
    });
    write_json(&folder.join("generation_config.json"), &generation)?;
    write_json(&folder.join(CONFIG_FILE), &config::write(&source.model, end_of_text))
}

/// Finds the token that ends a text among a tokenizer's added tokens.
fn find_end(path: &Path, text: &[u8]) -> Result<Option<(String, u32)>, CheckpointError> {
    let json: Value = serde_json::from_slice(text)
        .map_err(|e| CheckpointError::Format { path: path.to_owned(), message: e.to_string() })?;
    let added = json.get("added_tokens").and_then(Value::as_array);
    let id_of = |name: &str| {
        let token = added?.iter().find(|t| t.get("content").is_some_and(|c| c == name))?;
        u32::try_from(token.get("id")?.as_u64()?).ok()
    };
    Ok(END_NAMES.iter().find_map(|name| Some(((*name).to_owned(), id_of(name)?))))
}

fn write_json(path: &Path, value: &Value) -> Result<(), CheckpointError> {
    let text = format!("{value:#}\n");
    durable::write(path, text.as_bytes()).map_err(CheckpointError::io(path))
}
