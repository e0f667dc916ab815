//! The gateway in front of a scripted leader rank and a scripted control plane, over real sockets.

mod fakes;

use std::time::{Duration, Instant};

use fakes::{Fixture, GATEWAY_KEY, PATIENCE};
use serde_json::{Value, json};

fn ask(prompt: &str) -> Value {
    json!({ "model": "demo", "prompt": prompt, "max_tokens": 4, "temperature": 0 })
}

#[tokio::test(flavor = "multi_thread")]
async fn streaming_says_the_same_as_not_streaming() {
    let fixture = Fixture::start(4).await;
    let whole = fixture.post("/v1/completions", &ask("abcd")).await;
    assert_eq!(whole.status, 200);
    let text = whole.json["choices"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text, "dcba", "the scripted leader says the prompt backwards");
    assert_eq!(whole.json["choices"][0]["finish_reason"], "length");
    assert_eq!(whole.json["usage"]["prompt_tokens"], 4);
    assert_eq!(whole.json["usage"]["completion_tokens"], 4);
    assert_eq!(whole.json["usage"]["total_tokens"], 8);
    assert_eq!(whole.json["usage"]["prompt_tokens_details"]["cached_tokens"], 2);

    let mut request = ask("abcd");
    request["stream"] = json!(true);
    request["stream_options"] = json!({ "include_usage": true });
    let events = fixture.stream("/v1/completions", &request).await;
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
    let parts: Vec<Value> =
        events[..events.len() - 1].iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let joined: String =
        parts.iter().filter_map(|part| part["choices"][0]["text"].as_str()).collect();
    assert_eq!(joined, text);
    assert_eq!(parts.last().unwrap()["usage"]["total_tokens"], 8);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_prompts_become_several_choices() {
    let fixture = Fixture::start(4).await;
    let mut request = ask("");
    request["prompt"] = json!(["ab", "cd"]);
    let answer = fixture.post("/v1/completions", &request).await;
    assert_eq!(answer.json["choices"][0]["text"], "ba");
    assert_eq!(answer.json["choices"][1]["text"], "dc");
    assert_eq!(answer.json["choices"][1]["index"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn chat_renders_the_models_template() {
    let fixture = Fixture::start(4).await;
    let request = json!({
        "model": "demo", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 3,
    });
    let answer = fixture.post("/v1/chat/completions", &request).await;
    assert_eq!(answer.status, 200, "{}", answer.json);
    // The scripted template is `<{{ content }}>`.
    assert_eq!(answer.json["choices"][0]["message"]["content"], ">ih");
    assert_eq!(answer.json["object"], "chat.completion");
    let mut streamed = request;
    streamed["stream"] = json!(true);
    let events = fixture.stream("/v1/chat/completions", &streamed).await;
    let first: Value = serde_json::from_str(&events[0]).unwrap();
    assert_eq!(first["choices"][0]["delta"]["role"], "assistant");
    let joined: String = events[..events.len() - 1]
        .iter()
        .map(|event| serde_json::from_str::<Value>(event).unwrap())
        .filter_map(|part| part["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect();
    assert_eq!(joined, ">ih");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_key_or_the_wrong_host_stays_out() {
    let fixture = Fixture::start(4).await;
    let body = ask("a").to_string();
    for (headers, status) in [
        (vec![], 401),
        (vec![("authorization", "Bearer wrong-wrong-wrong-wrong")], 401),
        (vec![("authorization", GATEWAY_KEY), ("host", "evil.example")], 403),
        (vec![("authorization", GATEWAY_KEY), ("origin", "http://evil.example")], 403),
        (vec![("authorization", GATEWAY_KEY)], 200),
    ] {
        let answer = fixture.send("POST", "/v1/completions", &headers, body.clone()).await;
        assert_eq!(answer.status, status, "{headers:?}");
    }
    // Every method is guarded, not only those that change something.
    for method in ["GET", "DELETE", "PUT", "PATCH", "OPTIONS"] {
        let headers = vec![("authorization", GATEWAY_KEY), ("origin", "http://evil.example")];
        let answer = fixture.send(method, "/v1/models", &headers, String::new()).await;
        assert_eq!(answer.status, 403, "{method}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_named_and_harm_nobody() {
    let fixture = Fixture::start(4).await;
    for (body, status, word) in [
        ("{", 400, "JSON"),
        ("[]", 400, "object"),
        (r#"{"model":"demo"}"#, 400, "prompt"),
        (r#"{"model":"nope","prompt":"x"}"#, 404, "served now: demo"),
        (r#"{"model":"demo","prompt":"x","n":3}"#, 400, "n = 3"),
        (r#"{"model":"demo","prompt":"x","tools":[1]}"#, 400, "tools"),
        (r#"{"model":"demo","prompt":"x","max_tokens":0}"#, 400, "max_tokens"),
        (r#"{"model":"demo","prompt":"too long"}"#, 400, "never fit"),
    ] {
        let headers = [("authorization", GATEWAY_KEY)];
        let answer = fixture.send("POST", "/v1/completions", &headers, body.to_owned()).await;
        assert_eq!(answer.status, status, "{body}");
        let message = answer.json["error"]["message"].as_str().unwrap_or_default();
        assert!(message.contains(word), "{body}: {message}");
    }
    let huge = format!(r#"{{"model":"demo","prompt":"{}"}}"#, "x".repeat(5 << 20));
    let headers = [("authorization", GATEWAY_KEY)];
    for _ in 0..20 {
        let answer = fixture.send("POST", "/v1/completions", &headers, huge.clone()).await;
        assert_eq!(answer.status, 413);
        assert!(answer.text.contains("at most 4194304"), "{}", answer.text);
    }
    assert_eq!(fixture.post("/v1/completions", &ask("ok")).await.status, 200);
    assert_eq!(fixture.send("GET", "/nowhere", &headers, String::new()).await.status, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_answers_at_once_and_frees_its_places() {
    // One place in the batch and one in the queue.
    let fixture = Fixture::start(2).await;
    let slow = |fixture: Fixture| {
        tokio::spawn(async move { fixture.post("/v1/completions", &ask("slow")).await.status })
    };
    let running = [slow(fixture.clone()), slow(fixture.clone())];
    fixture.wait_for_running(2).await;
    let refused = fixture.post("/v1/completions", &ask("abcd")).await;
    assert_eq!(refused.status, 429);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(refused.json["error"]["type"], "rate_limit_error");
    fixture.release();
    for request in running {
        assert_eq!(request.await.unwrap(), 200);
    }
    assert_eq!(fixture.post("/v1/completions", &ask("abcd")).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_stops_its_generation() {
    let fixture = Fixture::start(2).await;
    for stream in [false, true] {
        let mut request = ask("slow");
        request["stream"] = json!(stream);
        let body = request.to_string();
        let going = fixture.clone();
        let task = tokio::spawn(async move {
            let headers = [("authorization", GATEWAY_KEY)];
            going.send("POST", "/v1/completions", &headers, body).await
        });
        fixture.wait_for_running(1).await;
        task.abort();
        fixture.wait_for_running(0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ready_means_that_the_ranks_answered_just_now() {
    let fixture = Fixture::start(2).await;
    let headers = [];
    assert_eq!(fixture.send("GET", "/healthz", &headers, String::new()).await.status, 200);
    assert_eq!(fixture.send("GET", "/readyz", &headers, String::new()).await.status, 200);
    fixture.set_healthy(false);
    let answer = fixture.send("GET", "/readyz", &headers, String::new()).await;
    assert_eq!((answer.status, &answer.json["ready"]), (503, &json!(false)));
    // The process itself is fine all the while.
    assert_eq!(fixture.send("GET", "/healthz", &headers, String::new()).await.status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_moves_is_followed() {
    let fixture = Fixture::start(2).await;
    fixture.set_served(false);
    fixture.wait_for_status(404).await;
    fixture.set_served(true);
    fixture.wait_for_status(200).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_users_feel_is_counted() {
    let fixture = Fixture::start(4).await;
    fixture.post("/v1/completions", &ask("abcd")).await;
    // A name that nobody serves must not become a label of a metric.
    let mut wrong = ask("abcd");
    wrong["model"] = json!("anything-a-stranger-sends");
    fixture.post("/v1/completions", &wrong).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    let page = fixture.send("GET", "/metrics", &[], String::new()).await.text;
    for line in [
        r#"drumline_gateway_requests_total{model="demo",outcome="ok"} 1"#,
        r#"drumline_gateway_tokens_total{kind="completion",model="demo"} 4"#,
        r#"drumline_gateway_time_to_first_token_seconds_count{model="demo"} 1"#,
        r#"drumline_gateway_requests_in_flight{model="demo"} 0"#,
        r#"drumline_gateway_queue_seconds_sum{model="demo"} 0.001"#,
        r#"drumline_gateway_prefill_seconds_sum{model="demo"} 0.015"#,
        r#"drumline_gateway_decode_seconds_count{model="demo"} 1"#,
        r#"drumline_gateway_inter_token_latency_seconds_count{model="demo"} 3"#,
        r#"drumline_gateway_request_success_total{finished_reason="length",model="demo"} 1"#,
        r#"drumline_gateway_prefix_cache_queries_total{model="demo"} 4"#,
        r#"drumline_gateway_prefix_cache_hits_total{model="demo"} 2"#,
        r#"drumline_gateway_time_to_first_token_seconds_bucket{model="demo",le="2560"} 1"#,
    ] {
        assert!(page.contains(line), "{line} in\n{page}");
    }
    assert!(!page.contains("stranger"));
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_go_to_the_replica_with_room() {
    let gateway = Fixture::start_replicas(3, 2).await;
    let slow: Vec<_> = (1..=6)
        .map(|count| {
            let gateway = gateway.clone();
            (
                count,
                tokio::spawn(async move { gateway.post("/v1/completions", &ask("slow")).await }),
            )
        })
        .collect();
    gateway.wait_for_running(6).await;
    assert_eq!(gateway.running(), [2, 2, 2], "none has more to do than another");
    let full = gateway.post("/v1/completions", &ask("slow")).await;
    assert_eq!((full.status, full.header("retry-after")), (429, Some("1")));
    assert!(full.json["error"]["message"].as_str().unwrap().starts_with("6 requests"));
    gateway.release();
    for (count, answer) in slow {
        assert_eq!(answer.await.unwrap().status, 200, "{count}");
    }
    let list = gateway.send("GET", "/readyz", &[], String::new()).await;
    assert_eq!(list.json["models"][0]["replicas_ready"], 3, "{}", list.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_beginning_goes_to_one_replica() {
    // Each takes 8 in its queue, so that nobody is full.
    let gateway = Fixture::start_replicas(3, 8).await;
    for _ in 0..3 {
        let running = tokio::spawn({
            let gateway = gateway.clone();
            async move { gateway.post("/v1/completions", &ask("slow")).await }
        });
        gateway.wait_for_running(1).await;
        let first = gateway.running();
        running.abort();
        gateway.wait_for_running(0).await;
        let again = tokio::spawn({
            let gateway = gateway.clone();
            async move { gateway.post("/v1/completions", &ask("slow")).await }
        });
        gateway.wait_for_running(1).await;
        assert_eq!(gateway.running(), first);
        again.abort();
        gateway.wait_for_running(0).await;
    }
}

/// Waits until so many replicas answer.
async fn wait_for_ready(gateway: &Fixture, status: u16, replicas: u64) {
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        let ready = gateway.send("GET", "/readyz", &[], String::new()).await;
        if ready.status == status && ready.json["models"][0]["replicas_ready"] == replicas {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("not {replicas} replicas within {PATIENCE:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_gone_is_passed_over() {
    let gateway = Fixture::start_replicas(2, 4).await;
    gateway.end(0);
    // Whichever of the two these prompts belong to.
    for prompt in ["a", "b", "c", "d", "e", "f", "g", "h"] {
        let answer = gateway.post("/v1/completions", &ask(prompt)).await;
        assert_eq!(
            (answer.status, &answer.json["choices"][0]["text"]),
            (200, &Value::from(prompt))
        );
    }
    wait_for_ready(&gateway, 200, 1).await;
    gateway.end(1);
    wait_for_ready(&gateway, 503, 0).await;
    let answer = gateway.post("/v1/completions", &ask("a")).await;
    assert_eq!(answer.status, 503, "{}", answer.text);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_goes_finishes_what_it_has() {
    let gateway = Fixture::start_replicas(2, 4).await;
    let slow: Vec<_> = (0..4)
        .map(|_| {
            let gateway = gateway.clone();
            tokio::spawn(async move { gateway.post("/v1/completions", &ask("slow")).await })
        })
        .collect();
    gateway.wait_for_running(4).await;
    assert_eq!(gateway.running(), [2, 2]);
    gateway.set_ready(0, false);
    wait_for_ready(&gateway, 200, 1).await;
    let more = tokio::spawn({
        let gateway = gateway.clone();
        async move { gateway.post("/v1/completions", &ask("slow")).await }
    });
    gateway.wait_for_running(5).await;
    assert_eq!(gateway.running(), [2, 3], "nothing new is sent there");
    gateway.release();
    for answer in slow.into_iter().chain([more]) {
        assert_eq!(answer.await.unwrap().status, 200);
    }
}
