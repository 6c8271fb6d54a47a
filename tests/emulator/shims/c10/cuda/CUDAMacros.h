#pragma once
#define C10_COMPILE_TIME_MAX_GPUS 120
