-- The first shape of the tables that the cache invalidation works on: every reference is a uuid,
-- votes and bids name their event, media belong to an artwork_id, easels are text.
-- An example to try things on: safe to run again, changes nothing that exists.

create table if not exists public.events (
    id uuid primary key default gen_random_uuid(),
    eid varchar(50) unique,
    name text,
    created_at timestamptz not null default now()
);

create table if not exists public.art (
    id uuid primary key default gen_random_uuid(),
    event_id uuid references public.events (id) on delete cascade,
    artist_id uuid,
    round integer,
    easel text,
    status text not null default 'active',
    current_bid numeric,
    created_at timestamptz not null default now()
);

create table if not exists public.votes (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    person_id uuid,
    round integer,
    event_id uuid references public.events (id) on delete cascade,
    created_at timestamptz not null default now()
);

create table if not exists public.bids (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    person_id uuid,
    amount numeric,
    event_id uuid references public.events (id) on delete cascade,
    created_at timestamptz not null default now()
);

create table if not exists public.art_media (
    id uuid primary key default gen_random_uuid(),
    artwork_id uuid references public.art (id) on delete cascade,
    media_id uuid,
    created_at timestamptz not null default now()
);
