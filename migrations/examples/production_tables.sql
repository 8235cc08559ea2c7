-- The grown shape of the tables that the cache invalidation works on: a vote names its artwork by
-- code and by uuid, a bid does not name its event, media belong to an art_id, easels are numbers
-- and may be missing.
-- An example to try things on: safe to run again, changes nothing that exists.

do $$
begin
    if to_regtype('public.art_status') is null then
        create type public.art_status as enum ('active', 'closed', 'sold', 'cancelled', 'paid');
    end if;
end
$$;

create table if not exists public.people (
    id uuid primary key default gen_random_uuid(),
    nickname text,
    created_at timestamptz not null default now()
);

create table if not exists public.events (
    id uuid primary key default gen_random_uuid(),
    eid varchar(50) unique,
    name text,
    venue text,
    enabled boolean not null default true,
    current_round integer,
    enable_auction boolean not null default true,
    event_start_datetime timestamptz,
    created_at timestamptz not null default now()
);

create table if not exists public.art (
    id uuid primary key default gen_random_uuid(),
    art_code varchar(50) unique,
    event_id uuid references public.events (id) on delete cascade,
    artist_id uuid,
    round integer,
    easel integer,
    status public.art_status not null default 'active',
    starting_bid numeric,
    current_bid numeric,
    bid_count integer not null default 0,
    vote_count integer not null default 0,
    closing_time timestamptz,
    winner_id uuid references public.people (id) on delete set null,
    description text,
    created_at timestamptz not null default now(),
    updated_at timestamptz not null default now()
);
create index if not exists art_event_id_idx on public.art (event_id);

create table if not exists public.votes (
    id uuid primary key default gen_random_uuid(),
    event_id uuid references public.events (id) on delete cascade,
    eid varchar(20),
    round integer,
    easel integer,
    art_id varchar(50),
    art_uuid uuid references public.art (id) on delete cascade,
    person_id uuid,
    vote_factor numeric not null default 1,
    created_at timestamptz not null default now(),
    unique (event_id, round, person_id)
);

create table if not exists public.bids (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    person_id uuid,
    amount numeric,
    currency_code varchar(3) not null default 'USD',
    created_at timestamptz not null default now()
);
create index if not exists bids_art_id_idx on public.bids (art_id);

create table if not exists public.art_media (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    media_id uuid,
    is_primary boolean not null default false,
    display_order integer not null default 0,
    created_at timestamptz not null default now()
);

create table if not exists public.rounds (
    id uuid primary key default gen_random_uuid(),
    event_id uuid references public.events (id) on delete cascade,
    round_number integer,
    is_finished boolean not null default false,
    created_at timestamptz not null default now()
);

create table if not exists public.round_contestants (
    id uuid primary key default gen_random_uuid(),
    round_id uuid references public.rounds (id) on delete cascade,
    artist_id uuid,
    easel_number integer,
    is_winner boolean not null default false,
    created_at timestamptz not null default now()
);

create table if not exists public.event_artists (
    id uuid primary key default gen_random_uuid(),
    event_id uuid references public.events (id) on delete cascade,
    artist_id uuid,
    status text not null default 'invited',
    created_at timestamptz not null default now()
);

create table if not exists public.artwork_offers (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    offered_to_person_id uuid,
    offered_amount numeric,
    status text not null default 'pending',
    expires_at timestamptz,
    created_at timestamptz not null default now()
);

create table if not exists public.payment_processing (
    id uuid primary key default gen_random_uuid(),
    art_id uuid references public.art (id) on delete cascade,
    person_id uuid,
    amount numeric,
    currency varchar(3) not null default 'USD',
    status text not null default 'pending',
    created_at timestamptz not null default now()
);
