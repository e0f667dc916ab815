//! Reads a folder in the Hugging Face layout.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use drumline_mesh::ShardSpec;
use drumline_spec::{Family, ModelConfig};
use serde::Deserialize;

use super::{CONFIG_FILE, INDEX_FILE, TOKENIZER_FILE, WEIGHTS_FILE, config, weights};
use crate::error::CheckpointError;
use crate::reader::{Reader, TensorFile};
use crate::source::ModelSource;

/// Opens a folder with `config.json` and `model.safetensors`, in one file or in several with an
/// index. Elements of f32, f16 and bf16 are read as f32.
///
/// # Errors
/// [`CheckpointError::Unsupported`] for an architecture or setting that the engine does not
/// cover, by name; [`CheckpointError::Tensor`] when a weight is missing or has another shape;
/// [`CheckpointError::Format`] and [`CheckpointError::Io`].
pub fn open(folder: &Path) -> Result<ModelSource, CheckpointError> {
    let config_path = folder.join(CONFIG_FILE);
    let text = fs::read(&config_path).map_err(CheckpointError::io(&config_path))?;
    let model = config::read(&config_path, &text)?;
    let mut reader = Reader::default();
    for name in weight_files(folder)? {
        let file = TensorFile::open(&folder.join(name))?;
        let number = reader.add_file(file);
        add_weights(&mut reader, number, &model)?;
    }
    for (name, shape) in weights(&model) {
        let message = match reader.shape(&name) {
            None => format!("it is not in {}", folder.display()),
            Some(got) if got != shape => format!("its shape is {got:?}, expected {shape:?}"),
            Some(_) => continue,
        };
        return Err(CheckpointError::Tensor { name, message });
    }
    let tokenizer = Some(folder.join(TOKENIZER_FILE)).filter(|path| path.exists());
    Ok(ModelSource {
        path: folder.to_owned(),
        model,
        reader,
        tokenizer,
        step: None,
        refused: Vec::new(),
    })
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn weight_files(folder: &Path) -> Result<Vec<String>, CheckpointError> {
    let path = folder.join(INDEX_FILE);
    if !path.exists() {
        return Ok(vec![WEIGHTS_FILE.to_owned()]);
    }
    let text = fs::read(&path).map_err(CheckpointError::io(&path))?;
    let format = |message: String| CheckpointError::Format { path: path.clone(), message };
    let index: Index = serde_json::from_slice(&text).map_err(|e| format(e.to_string()))?;
    let mut files: Vec<String> = index.weight_map.into_values().collect();
    files.sort();
    files.dedup();
    let inside = |file: &str| !file.contains(['/', '\\']) && file != "..";
    match files.iter().find(|file| !inside(file)) {
        Some(file) => Err(format(format!("{file} is not in the folder"))),
        None => Ok(files),
    }
}

/// Adds the tensors of a file that are weights of the model. Others are buffers that older
/// programs saved (masks, inverse frequencies), and the copy of a tied head.
fn add_weights(
    reader: &mut Reader,
    file: usize,
    model: &ModelConfig,
) -> Result<(), CheckpointError> {
    let found: Vec<_> = reader
        .file(file)
        .tensors()
        .map(|stored| (stored.key.clone(), stored.shape.clone()))
        .collect();
    for (key, shape) in found {
        // The first GPT-2 files were saved without the head's prefix.
        let bare = model.family == Family::Gpt2
            && !key.starts_with("transformer.")
            && !key.starts_with("lm_head.");
        let name = if bare { format!("transformer.{key}") } else { key.clone() };
        let buffer = [".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"];
        let tied = name == "lm_head.weight" && model.tie_embeddings;
        if tied || buffer.iter().any(|end| name.ends_with(end)) {
            continue;
        }
        if reader.shape(&name).is_some() {
            return Err(CheckpointError::Tensor {
                name,
                message: format!("{} holds it again", reader.file(file).path().display()),
            });
        }
        let spec =
            ShardSpec { name, global_shape: shape.clone(), offset: vec![0; shape.len()], shape };
        reader.add_part(spec, file, &key)?;
    }
    Ok(())
}
