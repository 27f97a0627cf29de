//! The weights of a model file, and running them: the only file that knows candle's models.

use std::fs::File;
use std::io::{BufReader, Cursor};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, Value};
use candle_core::{Device, Error, Tensor};
use candle_transformers::models::quantized_llama::{MAX_SEQ_LEN, ModelWeights};

/// Weights that are shared by all who run them.
pub(crate) struct Weights {
    /// Cloning it shares the weights; what a run remembers of its tokens is its own.
    model: ModelWeights,
    /// Most tokens of prompt and answer together.
    context: usize,
}

impl Weights {
    /// Reads the weights of a file of the Llama architecture, or says what is wrong with it. Those that are
    /// packed stay so, and what they are multiplied with is packed as they are, unless they are to be
    /// unpacked.
    pub(crate) fn read(
        content: Content,
        file: &mut BufReader<File>,
        vocabulary: usize,
        unpack: bool,
    ) -> Result<Self, String> {
        match content.metadata.get("general.architecture") {
            Some(Value::String(name)) if name == "llama" => {}
            Some(Value::String(name)) => {
                return Err(format!(
                    "general.architecture: expected llama, found {name}"
                ));
            }
            _ => return Err("general.architecture: expected llama, found none".to_owned()),
        }
        let trained = match content.metadata.get("llama.context_length") {
            Some(value) => value
                .to_u32()
                .ok()
                .and_then(|length| usize::try_from(length).ok()),
            None => None,
        };
        let trained = trained.filter(|&length| length > 1).ok_or(
            "llama.context_length: expected the number of tokens that the model was trained for, over 1",
        )?;
        let rows = content.tensor_infos.get("token_embd.weight");
        let rows = rows.and_then(|info| info.shape.dims().first().copied());
        if rows != Some(vocabulary) {
            return Err(format!(
                "token_embd.weight: expected {vocabulary} rows, one for each token, found {rows:?}"
            ));
        }
        let end = file
            .get_ref()
            .metadata()
            .map_err(|error| error.to_string())?;
        for (name, info) in &content.tensor_infos {
            let block = info.ggml_dtype.block_size();
            let bytes =
                (info.shape.elem_count() / block).saturating_mul(info.ggml_dtype.type_size());
            let ends = content
                .tensor_data_offset
                .saturating_add(info.offset)
                .saturating_add(bytes as u64);
            if ends > end.len() {
                return Err(format!(
                    "expected at least {ends} bytes, for {name}, found {}: the file is cut short",
                    end.len()
                ));
            }
        }
        let unreliable = |kind: GgmlDType| matches!(kind, GgmlDType::Q4_1 | GgmlDType::Q5_1);
        let mut tensors = content.tensor_infos.values();
        if !unpack && tensors.any(|info| unreliable(info.ggml_dtype)) {
            return Err(
                "expected weights that can be used as they are packed, found some of Q4_1 or Q5_1, which give \
                 wrong answers: set unpack = true, or take a file of Q4_0, Q8_0 or Q4_K"
                    .to_owned(),
            );
        }
        let model = if unpack {
            unpacked(content, file)
        } else {
            ModelWeights::from_gguf(content, file, &Device::Cpu)
        };
        Ok(Weights {
            model: model.map_err(|error| error.to_string())?,
            context: trained.min(MAX_SEQ_LEN),
        })
    }

    /// Most tokens of prompt and answer together.
    pub(crate) fn context(&self) -> usize {
        self.context
    }

    /// Begins a text.
    pub(crate) fn begin(&self) -> Run {
        Run {
            model: self.model.clone(),
            tokens: 0,
        }
    }
}

/// The model with its weights as 32-bit numbers, which candle takes from a file only.
fn unpacked(mut content: Content, file: &mut BufReader<File>) -> Result<ModelWeights, Error> {
    let mut names: Vec<String> = content.tensor_infos.keys().cloned().collect();
    names.sort_unstable();
    let mut bytes: Vec<u8> = Vec::new();
    let mut places = Vec::with_capacity(names.len());
    for name in &names {
        places.push(bytes.len() as u64);
        let tensor = content.tensor(file, name, &Device::Cpu)?;
        let values = tensor.dequantize(&Device::Cpu)?.flatten_all()?;
        for value in values.to_vec1::<f32>()? {
            bytes.extend_from_slice(&value.to_le_bytes());
        }
    }
    for (name, place) in names.iter().zip(places) {
        if let Some(info) = content.tensor_infos.get_mut(name) {
            info.offset = place;
            info.ggml_dtype = GgmlDType::F32;
        }
    }
    content.tensor_data_offset = 0;
    ModelWeights::from_gguf(content, &mut Cursor::new(bytes), &Device::Cpu)
}

/// One text that the model reads and writes.
pub(crate) struct Run {
    model: ModelWeights,
    /// How many tokens it has read.
    tokens: usize,
}

impl Run {
    /// How many tokens were read.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Reads the next tokens, at least one and within the context, and gives a score for each token that may
    /// follow.
    pub(crate) fn read(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Error> {
        let input = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        let scores = self.model.forward(&input, self.tokens)?;
        self.tokens += tokens.len();
        scores.flatten_all()?.to_vec1()
    }
}
