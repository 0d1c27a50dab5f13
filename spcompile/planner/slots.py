"""Which slot each stay of a streamed page gets, offline, for as many iterations as it takes to repeat.

What: equal slots, handed out by a first-in-first-out list of free ones, followed around the cycle of iterations.
Why a period: five pages around a cycle of two slots cannot have fixed slots. In the chain 01 12 23 34 40 each copy has
to take the one slot that is free at that moment, and after one iteration pages 0 and 1 have changed places. Reuse by
``index % slots`` within an iteration is wrong at exactly this point.

Why purely periodic: let the state at the start of an iteration be who sits where: which slot each page of the start
set has, and the free slots in the order of their list. Where the list hands out its head and takes back at its tail, it never
looks at the name of a slot, and every iteration makes the same stays. So each iteration does the same to the *places*
of the state (start set and free list): whatever slot was at place i ends up at place perm(i). All slots are at some
place, before and after, so perm is a permutation, and relabelling it back undoes an iteration. A sequence that can be
undone cannot enter a cycle from outside: the state that first comes again is the first one, after P = order of perm
iterations (the least common multiple of its cycles).

For a chain of N distinct pages on k <= N slots, slots are freed in the order of the copies, so the list goes round and
round: copy number i gets slot ``i % k`` counted over all iterations, and P = k / gcd(k, N).
"""
