/* SPDX-License-Identifier: LGPL-2.1-or-later
 *
 * Memory stores that outlive their opening.
 */
#ifndef OX_STORE_MEMORY_H
#define OX_STORE_MEMORY_H

/* Drops the content that "memory:NAME:SIZE" left behind; whoever has it open keeps it until
 * closing.  Unknown names are fine.  Any thread. */
void ox_memory_forget(const char *name);

#endif
