// The kernels, for the instruction set KD_ISA whose Vec has been included. The order is that of their use.
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors pass between inlined functions alone
#include "run_team.h"
#include "row_math.h"
#include "context.h"
#include "stats.h"
#include "row_terms.h"
#include "exps.h"
#include "gradients.h"
#include "rows.h"
#include "columns.h"
#include "engine.h"
