//! Answers from the first moment on: that the agent is starting, until there is more to say.

use axum::{
    Router,
    extract::Request,
    response::{IntoResponse, Response},
};
use std::sync::{Arc, OnceLock};
use tower::ServiceExt;

/// Stands before a server's real answers. Clones are the same front.
#[derive(Clone, Debug, Default)]
pub struct Front {
    real: Arc<OnceLock<Router>>,
}

impl Front {
    /// What is to be served: `starting` answers everything until the front is opened.
    pub fn router(&self, starting: fn(&Request) -> Response) -> Router {
        let front = self.clone();
        let answer = move |request: Request| {
            let real = front.real.get().cloned();
            async move {
                match real {
                    Some(real) => real.oneshot(request).await.into_response(),
                    None => starting(&request),
                }
            }
        };
        Router::new().fallback(answer)
    }

    /// Lets the real answers through; only the first ones count.
    pub fn open(&self, real: Router) {
        let _ = self.real.set(real);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::{body::Body, http::StatusCode, routing::get};

    #[tokio::test]
    async fn a_front_answers_before_it_is_opened_and_gives_way_then() {
        let front = Front::default();
        let served = front.router(|_| StatusCode::SERVICE_UNAVAILABLE.into_response());
        let ask = || {
            let request = Request::get("/x").body(Body::empty()).unwrap();
            let served = served.clone();
            async move { served.oneshot(request).await.unwrap().status() }
        };
        assert_eq!(ask().await, StatusCode::SERVICE_UNAVAILABLE);
        front.open(Router::new().route("/x", get(|| async {})));
        assert_eq!(ask().await, StatusCode::OK);
    }
}
