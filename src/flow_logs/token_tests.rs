#![allow(clippy::unwrap_used)]

use serde_json::json;

use super::*;
use crate::flow_logs::fixtures::{NOW, at, authorization_with, claims, token_of};

const ID: &str = "5d1c7a52-6c4e-4a55-9d3f-0f5f5b1f7e11";

fn b64(text: &str) -> String {
    URL_SAFE_NO_PAD.encode(text)
}

fn refused(token: &str) -> TokenError {
    Authorization::parse(token).unwrap_err()
}

#[test]
fn a_token_as_the_portal_makes_it_is_read() {
    let token = token_of(&claims(ID));
    let authorization = Authorization::parse(&token).unwrap();
    assert_eq!(authorization.id(), ID);
    assert_eq!(
        authorization.resource_id(),
        "0a0a0a0a-1b1b-4c2c-8d3d-4e4e4e4e4e4e"
    );
    assert!(authorization.uploads_enabled());
    assert_eq!(authorization.expires_at(), 4_102_444_800);
    assert_eq!(authorization.token().expose_secret(), token);
}

#[test]
fn a_token_of_the_stand_in_portal_is_read() {
    use firezone_lab::portal::ingest_token;
    let claims = ingest_token::Claims {
        account_id: uuid::Uuid::nil(),
        iat: NOW,
        exp: ingest_token::expiry(NOW),
        uploads_enabled: false,
        role: ingest_token::Role::Responder,
        initiator_device_id: uuid::Uuid::nil(),
        responder_device_id: uuid::Uuid::nil(),
        policy_authorization_id: uuid::Uuid::max(),
        policy_id: uuid::Uuid::nil(),
        resource_id: uuid::Uuid::nil(),
        resource_name: "Lab".to_owned(),
        resource_address: None,
        initiator_actor_id: uuid::Uuid::nil(),
        initiator_actor_name: "Ada".to_owned(),
        initiator_actor_email: None,
        initiator_client_version: None,
        authorized_at: ingest_token::rfc3339(NOW),
        authorization_expires_at: ingest_token::rfc3339(NOW),
    };
    let authorization = Authorization::parse(&ingest_token::sign(&[7; 32], &claims)).unwrap();
    assert_eq!(authorization.id(), uuid::Uuid::max().to_string());
    assert!(!authorization.uploads_enabled());
    assert!(!authorization.is_expired(at(ingest_token::expiry(NOW) - 1)));
    assert!(authorization.is_expired(at(ingest_token::expiry(NOW))));
}

#[test]
fn unknown_claims_are_tolerated_and_each_required_one_is_required() {
    let mut more = claims(ID);
    more["initiator_device_serial"] = json!("C02");
    more["tomorrow"] = json!({"a": [1]});
    Authorization::parse(&token_of(&more)).unwrap();

    for name in claims(ID).as_object().unwrap().keys() {
        let mut fewer = claims(ID);
        fewer.as_object_mut().unwrap().remove(name);
        let error = refused(&token_of(&fewer));
        assert!(matches!(error, TokenError::Claim(n) if n == name), "{name}");
        let mut wrong = claims(ID);
        wrong[name] = json!([]);
        let error = refused(&token_of(&wrong));
        assert!(matches!(error, TokenError::Claim(n) if n == name), "{name}");
    }
    for exp in [json!(-1), json!(1.5), json!("1")] {
        let mut wrong = claims(ID);
        wrong["exp"] = exp;
        assert_eq!(refused(&token_of(&wrong)), TokenError::Claim("exp"));
    }
}

#[test]
fn an_id_that_could_leave_its_directory_is_refused() {
    for id in [
        "", ".", "..", "../a", "a/b", "/etc", "a\0b", "a b", "a\n", "ä", "a.b", "a_b", "%2e%2e",
    ] {
        assert_eq!(refused(&token_of(&claims(id))), TokenError::Id, "{id:?}");
    }
    assert_eq!(refused(&token_of(&claims(&"a".repeat(65)))), TokenError::Id);
    Authorization::parse(&token_of(&claims(&"a".repeat(64)))).unwrap();
}

#[test]
fn segments_must_be_three_and_not_empty() {
    let (header, body) = (b64(r#"{"alg":"HS256"}"#), b64(&claims(ID).to_string()));
    for token in [
        String::new(),
        "..".to_owned(),
        format!("{header}.{body}"),
        format!("{header}.{body}."),
        format!(".{body}.AA"),
        format!("{header}..AA"),
        format!("{header}.{body}.AA.AA"),
    ] {
        assert_eq!(refused(&token), TokenError::Segments, "{token}");
    }
    Authorization::parse(&format!("{header}.{body}.AA")).unwrap();
}

#[test]
fn segments_must_be_base64url_without_padding_and_json() {
    let (header, body) = (b64(r#"{"alg":"HS256"}"#), b64(&claims(ID).to_string()));
    let cases = [
        (
            format!("{header}.{body}.AA=="),
            TokenError::Encoding("signature"),
        ),
        (
            format!("{header}.{body}.+/+/"),
            TokenError::Encoding("signature"),
        ),
        (
            format!("{header}.{body}.A"),
            TokenError::Encoding("signature"),
        ),
        (format!("{header}.a b.AA"), TokenError::Encoding("claims")),
        (
            format!("{header}\n.{body}.AA"),
            TokenError::Encoding("header"),
        ),
        (
            format!("{}.{body}.AA", b64("[]")),
            TokenError::Json("header"),
        ),
        (
            format!("{header}.{}.AA", b64("\"x\"")),
            TokenError::Json("claims"),
        ),
        (
            format!("{header}.{}.AA", b64(&"[".repeat(9000))),
            TokenError::Json("claims"),
        ),
    ];
    for (token, error) in cases {
        assert_eq!(refused(&token), error);
    }
}

#[test]
fn only_hs256_for_a_responder_is_accepted() {
    let body = b64(&claims(ID).to_string());
    for header in [
        r#"{"alg":"none"}"#,
        r#"{"alg":"hs256"}"#,
        r#"{"alg":256}"#,
        "{}",
    ] {
        let token = format!("{}.{body}.AA", b64(header));
        assert_eq!(refused(&token), TokenError::Algorithm, "{header}");
    }
    let mut other = claims(ID);
    other["role"] = json!("initiator");
    assert_eq!(refused(&token_of(&other)), TokenError::Role);
    other["role"] = json!("admin");
    assert_eq!(refused(&token_of(&other)), TokenError::Claim("role"));
}

#[test]
fn a_huge_token_is_refused_before_it_is_decoded() {
    let mut long = claims(ID);
    long["padding"] = json!("x".repeat(MAX_TOKEN));
    assert_eq!(refused(&token_of(&long)), TokenError::TooLong);
    assert_eq!(refused(&".".repeat(1 << 20)), TokenError::TooLong);
}

#[test]
fn neither_debug_output_nor_errors_show_the_token() {
    let authorization = authorization_with(ID, "initiator_actor_name", json!("Grace"));
    let shown = format!("{authorization:?}");
    for part in authorization.token().expose_secret().split('.') {
        assert!(!shown.contains(part));
    }
    let mut wrong = claims(ID);
    wrong["exp"] = json!("secret-text");
    let error = refused(&token_of(&wrong));
    assert!(!format!("{error} {error:?}").contains("secret-text"));
}

#[test]
fn a_clock_before_1970_expires_nothing() {
    let authorization = authorization_with(ID, "exp", json!(NOW));
    let before = SystemTime::UNIX_EPOCH - Duration::from_secs(1);
    assert!(!authorization.is_expired(before));
    assert!(authorization.is_expired(at(NOW)));
}
