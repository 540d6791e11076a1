//! Links, addresses, routes and neighbours over rtnetlink.
