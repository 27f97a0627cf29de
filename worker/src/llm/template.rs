//! The template of a model file that makes one text of a conversation, as the model was trained to read it.

use minijinja::{Environment, Error, ErrorKind, context};

use super::request::Message;

#[cfg(test)]
mod tests;

/// Name of the one template. It has no ending that would have text escaped.
const NAME: &str = "chat";

/// Steps that rendering may take. A conversation takes some ten for each message; a template that goes on
/// beyond this does not end.
const FUEL: u64 = 10_000_000;

/// A template in Jinja, with what such templates expect to be there.
#[derive(Debug)]
pub(crate) struct Template {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl Template {
    /// Compiles a template, and tries it on a small conversation. `bos` and `eos` are the model's tokens for
    /// the beginning and the end of a text.
    pub(crate) fn new(source: String, bos: String, eos: String) -> Result<Self, Error> {
        let mut environment = Environment::new();
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment.set_fuel(Some(FUEL));
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |reason: String| -> Result<(), Error> {
            Err(Error::new(ErrorKind::InvalidOperation, reason))
        });
        environment.add_template_owned(NAME, source)?;
        let template = Template {
            environment,
            bos,
            eos,
        };
        let message = Message {
            role: "user",
            content: "hello".to_owned(),
        };
        template.render(&[message], None)?;
        Ok(template)
    }

    /// The text of a conversation up to where the answer begins, or up to where it goes on if it has `begun`.
    pub(crate) fn render(
        &self,
        messages: &[Message],
        begun: Option<&str>,
    ) -> Result<String, Error> {
        let messages: Vec<_> = messages
            .iter()
            .map(|message| context! { role => message.role, content => message.content })
            .collect();
        let mut text = self.environment.get_template(NAME)?.render(context! {
            messages,
            bos_token => self.bos,
            eos_token => self.eos,
            add_generation_prompt => true,
        })?;
        text.push_str(begun.unwrap_or_default());
        Ok(text)
    }
}
