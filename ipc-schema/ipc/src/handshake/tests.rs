use std::path::PathBuf;

use super::*;
use crate::message::Interface;

fn identity(role: Role, interface: Option<Interface>) -> Identity {
    Identity { name: "pager".into(), role, incarnation: 3, interface, limits: Limits::default() }
}

fn greeting(role: Role) -> Hello {
    let caller = Identity { name: "mirror".into(), ..identity(role, None) };
    let endpoint = Endpoint { path: PathBuf::new(), interface: Interface::Pager, key: b"secret".to_vec() };
    hello(&caller, &endpoint)
}

fn pager() -> Identity {
    identity(Role::Pager, Some(Interface::Pager))
}

fn keys() -> Keys {
    let mut keys = Keys::default();
    keys.set_key("mirror", b"secret".to_vec());
    keys
}

fn code<T>(result: Result<T, WireError>) -> Option<ErrorCode> {
    result.err().map(|error| error.code)
}

#[test]
fn the_smaller_version_and_limits_of_both_sides_are_agreed() {
    let mut greeting = greeting(Role::Mirror);
    greeting.minor = MINOR_VERSION + 5;
    greeting.max_message_bytes = 2000;
    greeting.max_fds = 3;
    let welcome = judge(&pager(), &keys(), &greeting).expect("welcome");
    assert_eq!((welcome.major, welcome.minor), (MAJOR_VERSION, MINOR_VERSION));
    assert_eq!((welcome.max_message_bytes, welcome.max_fds), (2000, 3));
    assert_eq!((welcome.name.as_str(), welcome.incarnation), ("pager", 3));
    greeting.minor = 0;
    greeting.max_message_bytes = u32::MAX;
    greeting.max_fds = u16::MAX;
    let welcome = judge(&pager(), &keys(), &greeting).expect("welcome");
    let ours = Limits::default();
    assert_eq!((welcome.minor, welcome.max_message_bytes, welcome.max_fds), (0, ours.max_message_bytes, ours.max_fds));
}

#[test]
fn another_major_version_is_refused() {
    let greeting = Hello { major: MAJOR_VERSION + 1, ..greeting(Role::Client) };
    assert_eq!(code(judge(&pager(), &keys(), &greeting)), Some(ErrorCode::Protocol));
}

#[test]
fn an_interface_that_is_not_served_is_refused() {
    let greeting = Hello { interface: Interface::Mirror, ..greeting(Role::Client) };
    assert_eq!(code(judge(&pager(), &keys(), &greeting)), Some(ErrorCode::Invalid));
    let nothing = identity(Role::Client, None);
    assert_eq!(code(judge(&nothing, &keys(), &greeting)), Some(ErrorCode::Invalid));
}

#[test]
fn a_service_without_the_right_key_is_refused_and_a_client_needs_none() {
    for key in [&b""[..], b"secreT", b"secret2", b"secre"] {
        let greeting = Hello { key: key.to_vec(), ..greeting(Role::Mirror) };
        assert_eq!(code(judge(&pager(), &keys(), &greeting)), Some(ErrorCode::Permission), "{key:?}");
    }
    assert_eq!(code(judge(&pager(), &Keys::default(), &greeting(Role::Mirror))), Some(ErrorCode::Permission));
    for role in [Role::Client, Role::Operator] {
        let greeting = Hello { key: Vec::new(), ..greeting(role) };
        assert_eq!(code(judge(&pager(), &Keys::default(), &greeting)), None, "{role:?}");
    }
}

#[test]
fn an_empty_key_admits_nobody() {
    let mut keys = Keys::default();
    keys.set_key("mirror", Vec::new());
    let greeting = Hello { key: Vec::new(), ..greeting(Role::Mirror) };
    assert_eq!(code(judge(&pager(), &keys, &greeting)), Some(ErrorCode::Permission));
}

#[test]
fn a_name_tied_to_a_role_may_take_no_other() {
    let mut keys = keys();
    assert_eq!(code(judge(&pager(), &keys, &greeting(Role::Supervisor))), None);
    keys.set_role("mirror", Role::Mirror);
    assert_eq!(code(judge(&pager(), &keys, &greeting(Role::Supervisor))), Some(ErrorCode::Permission));
    assert_eq!(code(judge(&pager(), &keys, &greeting(Role::Mirror))), None);
}

#[test]
fn a_caller_that_takes_no_sensible_message_is_refused() {
    let small = Hello { max_message_bytes: Limits::MIN_MESSAGE_BYTES - 1, ..greeting(Role::Client) };
    assert_eq!(code(judge(&pager(), &keys(), &small)), Some(ErrorCode::Invalid));
    let nameless = Hello { name: String::new(), ..greeting(Role::Client) };
    assert_eq!(code(judge(&pager(), &keys(), &nameless)), Some(ErrorCode::Invalid));
}

#[test]
fn a_welcome_beyond_what_was_asked_is_refused() {
    let caller = identity(Role::Client, None);
    let welcome = judge(&pager(), &keys(), &greeting(Role::Client)).expect("welcome");
    assert!(check_welcome(&caller, &welcome).is_ok());
    let bad = [
        Welcome { major: MAJOR_VERSION + 1, ..welcome.clone() },
        Welcome { minor: MINOR_VERSION + 1, ..welcome.clone() },
        Welcome { max_message_bytes: Limits::default().max_message_bytes + 1, ..welcome.clone() },
        Welcome { max_message_bytes: 10, ..welcome.clone() },
        Welcome { max_fds: Limits::default().max_fds + 1, ..welcome },
    ];
    for welcome in bad {
        assert_eq!(check_welcome(&caller, &welcome).map_err(|error| error.code), Err(ErrorCode::Protocol));
    }
}

#[test]
fn a_client_that_cannot_be_held_is_refused_and_told_why_and_a_service_is_not() {
    let problem = HookError::Strange { call: "fstat(pidfd)", detail: "it has no name".into() };
    assert_eq!(judge_process("app", Role::Client, None), Ok(()));
    assert_eq!(judge_process("pager", Role::Pager, Some(&problem)), Ok(()), "its last words count");
    for role in [Role::Client, Role::Operator] {
        let refused = judge_process("app", role, Some(&problem)).expect_err("nobody could watch it");
        assert_eq!(refused.code, ErrorCode::Permission);
        assert!(refused.text.contains("app") && refused.text.contains("it has no name"), "{refused}");
    }
}

#[test]
fn only_services_pass_a_door_for_services() {
    for (role, passes) in [
        (Role::Client, false),
        (Role::Operator, false),
        (Role::Driver, true),
        (Role::Mirror, true),
        (Role::Pager, true),
        (Role::Supervisor, true),
    ] {
        assert_eq!(code(judge_door(&greeting(role), true)), (!passes).then_some(ErrorCode::Permission), "{role:?}");
        assert_eq!(code(judge_door(&greeting(role), false)), None, "{role:?}");
    }
}

#[test]
fn operators_show_their_key_where_there_is_one() {
    let operator = greeting(Role::Operator);
    assert!(judge(&pager(), &keys(), &operator).is_ok(), "nobody gave one out");
    let mut keys = keys();
    keys.set_key(OPERATORS, b"theirs".to_vec());
    for wrong in [b"".as_slice(), b"secret", b"theirs "] {
        let hello = Hello { key: wrong.to_vec(), ..greeting(Role::Operator) };
        assert_eq!(code(judge(&pager(), &keys, &hello)), Some(ErrorCode::Permission));
    }
    assert!(judge(&pager(), &keys, &Hello { key: b"theirs".to_vec(), ..operator }).is_ok());
    // It is no other one's.
    assert!(judge(&pager(), &keys, &Hello { key: Vec::new(), ..greeting(Role::Client) }).is_ok());
    let hello = Hello { key: b"theirs".to_vec(), ..greeting(Role::Mirror) };
    assert_eq!(code(judge(&pager(), &keys, &hello)), Some(ErrorCode::Permission));
}
