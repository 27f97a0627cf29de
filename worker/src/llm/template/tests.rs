//! Templates of real files and of odd ones.

#![allow(clippy::unwrap_used)]

use super::*;

/// As in the file of SmolLM2.
const CHATML: &str = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn template(source: &str) -> Result<Template, String> {
    Template::new(source.to_owned(), "<s>".to_owned(), "</s>".to_owned())
        .map_err(|error| error.to_string())
}

fn said(role: &'static str, content: &str) -> Message {
    Message {
        role,
        content: content.to_owned(),
    }
}

#[test]
fn a_conversation_becomes_the_text_that_the_model_knows() {
    let template = template(CHATML).unwrap();
    let messages = [said("user", "{{ 1 }} <b>")];
    assert_eq!(
        template.render(&messages, None).unwrap(),
        "<|im_start|>system\nBe helpful<|im_end|>\n<|im_start|>user\n{{ 1 }} <b><|im_end|>\n<|im_start|>assistant\n"
    );
    let messages = [said("system", "x"), said("user", "y")];
    assert_eq!(
        template.render(&messages, Some("so far")).unwrap(),
        "<|im_start|>system\nx<|im_end|>\n<|im_start|>user\ny<|im_end|>\n<|im_start|>assistant\nso far"
    );
}

#[test]
fn templates_find_what_they_expect_to_be_there() {
    let source = "{{ bos_token }}{% for message in messages %}\n    {% set text = message.content.strip() | trim %}\n{{ text.upper() }}{{ eos_token }}{% endfor %}";
    let template = template(source).unwrap();
    let text = template.render(&[said("user", " hi ")], None).unwrap();
    assert_eq!(text, "<s>HI</s>");
}

#[test]
fn a_template_that_refuses_is_heard() {
    let source = "{% if messages | length > 1 %}{{ raise_exception('one at a time') }}{% endif %}";
    let template = template(source).unwrap();
    let messages = [said("user", "a"), said("user", "b")];
    let error = template.render(&messages, None).unwrap_err().to_string();
    assert!(error.contains("one at a time"), "{error}");
}

#[test]
fn a_template_that_does_not_read_or_end_is_refused() {
    let error = template("{% for %}").unwrap_err();
    assert!(error.starts_with("syntax error"), "{error}");
    let error = template("{{ nothing_like_it() }}").unwrap_err();
    assert!(error.starts_with("unknown function"), "{error}");
    let endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let error = template(endless).unwrap_err();
    assert!(error.contains("ran out of fuel"), "{error}");
}
