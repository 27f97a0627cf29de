#![allow(clippy::unwrap_used)]

use super::*;

fn identity(name: &str) -> Identity {
    Identity::new("example.org", "acme", "plant-1", name).unwrap()
}

#[test]
fn a_token_proves_its_identity_until_it_is_replaced_or_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.toml");
    let first = create(&path, "notebook", &identity("ann")).unwrap();
    let other = create(&path, "batch", &identity("job")).unwrap();
    let tokens = Tokens::load(&path).unwrap();
    assert_eq!(tokens.verify(&first), Some(identity("ann")));
    assert_eq!(tokens.verify(&other), Some(identity("job")));

    let second = create(&path, "notebook", &identity("ann")).unwrap();
    let tokens = Tokens::load(&path).unwrap();
    assert_eq!(tokens.verify(&first), None);
    assert_eq!(tokens.verify(&second), Some(identity("ann")));

    remove(&path, "notebook").unwrap();
    assert_eq!(Tokens::load(&path).unwrap().verify(&second), None);
    assert!(matches!(
        remove(&path, "notebook"),
        Err(TokensError::NotFound { .. })
    ));
    let left = list(&path).unwrap();
    assert_eq!((left.len(), left[0].name.as_str()), (1, "batch"));
}

#[test]
fn what_is_not_the_token_proves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.toml");
    let token = create(&path, "notebook", &identity("ann")).unwrap();
    let tokens = Tokens::load(&path).unwrap();
    let mut wrong = token.clone();
    let last = if wrong.pop() == Some('0') { '1' } else { '0' };
    wrong.push(last);
    for wrong in [
        "",
        "svt_",
        "é",
        &wrong,
        &token[..token.len() - 1],
        &token.to_uppercase(),
    ] {
        assert_eq!(tokens.verify(wrong), None, "{wrong}");
    }
    let text = std::fs::read_to_string(&path).unwrap();
    let secret = parts(&token).unwrap().1;
    assert!(!text.contains(secret));
    assert!(!format!("{tokens:?}").contains("sha256"));
}

#[cfg(unix)]
#[test]
fn only_the_owner_may_read_the_file() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.toml");
    create(&path, "notebook", &identity("ann")).unwrap();
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn every_problem_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens.toml");
    let good = format!("sha256:{}", "ab".repeat(32));
    let uri = identity("ann").uri().to_owned();
    let entry = |name: &str, id: &str, hash: &str, identity: &str| {
        format!(
            "[[token]]\nname = {name:?}\nid = {id:?}\nhash = {hash:?}\nidentity = {identity:?}\n"
        )
    };
    let text = [
        entry("", "0123456789abcdef", &good, &uri),
        entry("a", "0123", &good, &uri),
        entry("b", "0123456789abcdef", "secret", &uri),
        entry("c", "0123456789abcdef", &good, "ann"),
        entry("d", "0123456789abcdef", &good, &uri),
        entry("d", "0123456789abcdef", &good, &uri),
    ]
    .concat();
    std::fs::write(&path, text).unwrap();
    let Err(TokensError::Tokens { problems, .. }) = Tokens::load(&path) else {
        panic!("the file is wrong");
    };
    assert_eq!(problems.len(), 6, "{problems:?}");
    assert!(problems[0].contains("expected a name"));
    assert!(problems[1].contains("id: expected 16 hexadecimal digits"));
    assert!(problems[2].contains("hash: expected sha256:"));
    assert!(!problems.concat().contains("secret"));
    assert!(problems[4].contains("there twice"));
    assert!(problems[5].contains("id of another"));
    std::fs::write(&path, "[[tokens]]\n").unwrap();
    assert!(matches!(
        Tokens::load(&path),
        Err(TokensError::Syntax { .. })
    ));
}
