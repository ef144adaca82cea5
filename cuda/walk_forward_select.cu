// walk_forward_select
